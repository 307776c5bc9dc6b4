"""The records of one file, by its format, and where each one stands.

Text formats are read here, line by line, so that an error names its line; Arrow is read by ``datasets``.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from sppo_lightning.types import UserError, first_line

Record = tuple[str, Mapping[str, Any]]  # where it stands, for error messages; its fields
LONGEST_LINE = (
    64 * 2**20
)  # bytes, unpacked; no prompt is so long, but what a small packed file unfolds to may be
BATCH = 64  # rows of Parquet that are unpacked at once; a value that a page holds once may stand in every row
LONGEST_LIST = 2**30  # bytes of a JSON list, which is held as a whole


def format_of(file: Path) -> str | None:
    """Return the ending that says how a file is read, its compression left out; ``None``: it is not."""
    name = Path(file.name.lower())
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
        return name.suffix if name.suffix in TEXT_FORMATS else None
    return name.suffix if name.suffix in FORMATS else None


def file_records(file: Path, key: str) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        file: of one of :data:`FORMATS`.
        key: config key, for errors.

    Raises:
        UserError: naming the file and line, if it cannot be read.
    """
    ending = format_of(file)
    if ending is None:
        raise UserError(
            f"{key}: {file} is none of {', '.join(FORMATS)}; text formats may be compressed ({', '.join(COMPRESSIONS)})"
        )
    if file.exists() and not file.is_file():
        raise UserError(
            f"{key}: {file} is no plain file, but is read more than once: copy its content into a file"
        )
    try:
        yield from FORMATS[ending](file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{key}: {file} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        ) from error


def _open(file: Path) -> IO[bytes]:
    """Open a file for reading, decompressed."""
    opener = COMPRESSIONS.get(file.suffix.lower())
    opened: IO[bytes] = file.open("rb") if opener is None else opener(file)
    return opened


def _open_zstd(file: Path) -> IO[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return io.BufferedReader(stream)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line stands, and the line with its end."""
    with _open(file) as lines:
        for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{file}:{number}: the line is longer than {LONGEST_LINE // 2**20} MiB: is this a file of prompts?"
                )
            yield f"{file}:{number}", _text(line, file, number)


def _text(content: bytes, file: Path, line: int) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, what = error.start, "not UTF-8"
    else:
        place, what = content.find(b"\0"), "a NUL byte, as in UTF-16 or in a file that is no text"
        if place < 0:
            return text
    number = line + content.count(b"\n", 0, place)
    raise UserError(f"{file}:{number}: {what} (byte {place}): save the file as UTF-8")


def _jsonl_records(file: Path) -> Iterator[Record]:
    for where, line in _lines(file):
        if line.strip():
            yield where, _object(_parsed(line, where, "each line must be one JSON object"), where)


class _RepeatedFieldError(ValueError):
    """A JSON object names a field twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields; of one that stands twice, the first value would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _RepeatedFieldError(f"the field {twice!r} stands twice: rename or remove one")
    return found


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: broken JSON, {error.msg.removesuffix(' at')} at column {error.colno}: {expected}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON that is nested too deep") from error
    except _RepeatedFieldError as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: {first_line(error).partition(':')[0]}: write it as a text") from error


def _json_records(file: Path) -> Iterator[Record]:
    """Read a list of records, or, as ``datasets`` does, lines of one record each."""
    with _open(file) as content:
        whole = content.read(LONGEST_LIST + 1)
        if len(whole) > LONGEST_LIST:
            raise UserError(
                f"{file}: larger than {LONGEST_LIST // 2**20} MiB: write one record a line, as .jsonl, or Parquet"
            )
        text = _text(whole, file, 1)
        del whole
    if not text.strip():
        return
    if text.lstrip().startswith("{"):
        yield from _jsonl_records(file)
        return
    expected = "the file must be one JSON list, or one JSON object a line"
    try:
        items = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        items = _parsed(text, f"{file}:{error.lineno}", expected)
    except (RecursionError, ValueError):
        items = _parsed(text, str(file), expected)
    if not isinstance(items, list):
        raise UserError(f"{file}: expected a JSON list of prompt records; for one record a line use .jsonl")
    for number, item in enumerate(items, start=1):
        yield f"{file}:record {number}", _object(item, f"{file}:record {number}")


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with a 'prompt' field, got {type(value).__name__}")
    return value


def _text_records(file: Path) -> Iterator[Record]:
    for where, line in _lines(file):
        prompt = line.rstrip("\r\n")
        if "\r" in prompt:
            raise UserError(
                f"{where}: a carriage return inside a line: end lines by a line feed, or use .jsonl"
            )
        if prompt.strip():
            yield where, {"prompt": prompt}


def _csv_records(file: Path, delimiter: str = ",") -> Iterator[Record]:
    """Read cells as they are written: no number, date or missing value is guessed from a text."""
    csv.field_size_limit(LONGEST_LINE)  # the default refuses prompts over 128 KiB
    rows = csv.reader((line for _, line in _lines(file)), strict=True, delimiter=delimiter)
    sign = {",": "a comma", "\t": "a tab"}[delimiter]
    try:
        header = next(rows, [])
        _check_names(header, f"{file}:1")
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} cells under {len(header)} columns: put quotes around a cell that holds {sign}"
                )
            if row:
                yield where, {name: cell for name, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: broken CSV, {error}: check the quotes") from error


def _check_names(columns: Sequence[str], where: str) -> None:
    """Refuse two columns of one name: one of them would be lost in silence."""
    twice = next((name for name, count in Counter(columns).items() if name and count > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called {twice!r}: rename one")


def _tsv_records(file: Path) -> Iterator[Record]:
    return _csv_records(file, "\t")


def _parquet_records(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        content = pyarrow.parquet.ParquetFile(file)
        _check_names(content.schema_arrow.names, str(file))
        for batch in content.iter_batches(batch_size=BATCH):
            for fields in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", fields
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: cannot be read as Parquet: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: after row {number} a text is not UTF-8: write it anew") from error


def _arrow_records(file: Path) -> Iterator[Record]:
    import datasets
    import pyarrow

    try:
        table = datasets.Dataset.from_file(str(file))
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file}: cannot be read as Arrow: {first_line(error)}") from error
    yield from dataset_records(table, str(file))


TEXT_FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl_records,
    ".ndjson": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".txt": _text_records,
}
FORMATS = {**TEXT_FORMATS, ".parquet": _parquet_records, ".arrow": _arrow_records}


def dataset_records(table: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Yield the rows of a table of ``datasets``; ``name``: of it, for errors."""
    row = 0
    try:
        for row, fields in enumerate(table, start=1):
            yield f"{name}:row {row}", fields
    except Exception as error:  # of any column's own reader
        raise UserError(
            f"{name}: what comes after row {row} cannot be read ({first_line(error)}): write the data set anew"
        ) from error
