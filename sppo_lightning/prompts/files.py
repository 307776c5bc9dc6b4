"""The records of prompt files and data sets, and where each one stands.

A source is a file, a glob, a folder, what ``Dataset.save_to_disk`` wrote, or a data set of the hub. Files may be
compressed. What ``datasets`` reads better than a line reader (Arrow, the hub) it reads; text formats are read here, so
that an error names its line.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sppo_lightning.paths import expand_path
from sppo_lightning.types import UserError, first_line

Record = tuple[str, Mapping[str, Any]]  # where it stands, for error messages; its fields

ABOUT = ("dataset_info.json", "dataset_infos.json")  # what data sets say about themselves
SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|$)", re.IGNORECASE)


def records(source: str, *, key: str) -> Iterator[Record]:
    """Yield the records of one source.

    Args:
        source: a file, a glob, a folder, or a data set of the hub; see :func:`~.reading.read_prompts`.
        key: config key, for errors.

    Raises:
        UserError: naming the file and line, if there is no such source or it cannot be read.
    """
    if not source.strip():
        raise UserError(f"{key} is an empty text: name a file, a folder or a hub dataset")
    text = expand_path(source, key=key)
    path = Path(text)
    if path.is_dir():
        yield from _folder_records(path, None, key)
    elif path.is_file():
        yield from _file_records(path, key)
    elif files := sorted(Path(file) for file in glob.glob(text, recursive=True)):
        for file in files:
            yield from _file_records(file, key)
    elif (folder := Path(text.rpartition(":")[0])).is_dir() and ":" in text:
        yield from _folder_records(folder, text.rpartition(":")[2], key)
    elif _format(path) or path.is_absolute() or text.startswith(".") or "*" in text:
        raise UserError(f"{key}={source!r}: no such file; check the path (it is relative to {Path.cwd()})")
    else:
        yield from _hub_records(text, key)


def files_of(source: str, *, key: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder that are read, and those that are left out; of anything else nothing.

    Args:
        source: as :func:`records` takes it.
        key: config key, for errors.
    """
    path = Path(expand_path(source, key=key))
    if not path.is_dir() or _saved_dataset(path):
        return [], []
    return _readable(path)


# ---------------------------------------------------------------------- folders


def _saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _readable(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the readable files of a folder, and the others; of its subfolders only if it has none of its own."""
    for found in (folder.iterdir(), folder.rglob("*")):
        files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
        # a text file in a folder is more often a README than prompts
        read = [file for file in files if _format(file) not in (None, ".txt") and file.name not in ABOUT]
        if read:
            return read, [file for file in files if file not in read]
    return [], files


def _folder_records(folder: Path, split: str | None, key: str) -> Iterator[Record]:
    if _saved_dataset(folder):
        yield from _saved_records(folder, split, key)
        return
    files, _ = _readable(folder)
    if not files:
        raise UserError(
            f"{key}: folder {folder} has no {', '.join(name for name in FORMATS if name != '.txt')} file"
        )
    splits = {file: _split_of(file, folder) for file in files}
    names = sorted({name for name in splits.values() if name})
    if split is not None:
        files = [file for file in files if splits[file] == split.lower()]
        if not files:
            raise UserError(
                f"{key}: folder {folder} has no files of the split {split!r}; found: {', '.join(names) or 'none'}"
            )
    elif len(names) > 1:
        raise UserError(
            f"{key}: folder {folder} holds files of several splits ({', '.join(names)}): name one, e.g. "
            f"{folder}:{names[-1]}"
        )
    for file in files:
        yield from _file_records(file, key)


def _split_of(file: Path, folder: Path) -> str | None:
    """Return the split that a file's name, or that of its folder, says it belongs to."""
    for part in reversed(file.relative_to(folder).parts):
        found = SPLIT.search(part)
        if found:
            return found[1].lower()
    return None


def _saved_records(folder: Path, split: str | None, key: str) -> Iterator[Record]:
    """Read what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(
            f"{key}: {folder} cannot be read as a saved data set ({first_line(error)})"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split is None and len(table) > 1:
            raise UserError(
                f"{key}: {folder} has the splits {', '.join(table)}: name one, e.g. {folder}:{next(iter(table))}"
            )
        name = split or next(iter(table))
        if name not in table:
            raise UserError(f"{key}: {folder} has no split {name!r}; it has {', '.join(table)}")
        table = table[name]
    elif split is not None:
        raise UserError(f"{key}: {folder} is one data set without splits: leave out ':{split}'")
    yield from _dataset_records(table, str(folder))


def _dataset_records(table: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    row = 0
    try:
        for row, fields in enumerate(table, start=1):
            yield f"{name}:row {row}", fields
    except Exception as error:  # of any column's own reader
        raise UserError(
            f"{name}: what comes after row {row} cannot be read ({first_line(error)}): write the data set anew"
        ) from error


# ------------------------------------------------------------------------ files


def _format(file: Path) -> str | None:
    """Return the ending that says how a file is read, its compression left out; ``None``: it is not."""
    name = Path(file.name.lower())
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
        return name.suffix if name.suffix in TEXT_FORMATS else None
    return name.suffix if name.suffix in FORMATS else None


def _file_records(file: Path, key: str) -> Iterator[Record]:
    ending = _format(file)
    if ending is None:
        raise UserError(
            f"{key}: {file} is none of {', '.join(FORMATS)}; text formats may be compressed ({', '.join(COMPRESSIONS)})"
        )
    try:
        yield from FORMATS[ending](file)
    except (OSError, EOFError, lzma.LZMAError) as error:
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
        for number, line in enumerate(lines, start=1):
            yield f"{file}:{number}", _text(line, file, number)


def _text(content: bytes, file: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = line + content.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{number}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error


def _jsonl_records(file: Path) -> Iterator[Record]:
    for where, line in _lines(file):
        if line.strip():
            yield where, _object(_parsed(line, where, "each line must be one JSON object"), where)


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: broken JSON, {error.msg.removesuffix(' at')} at column {error.colno}: {expected}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON that is nested too deep") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where}: {first_line(error).partition(':')[0]}: write it as a text") from error


def _json_records(file: Path) -> Iterator[Record]:
    """Read a list of records, or, as ``datasets`` does, lines of one record each."""
    with _open(file) as content:
        text = _text(content.read(), file, 1)
    if not text.strip():
        return
    if text.lstrip().startswith("{"):
        yield from _jsonl_records(file)
        return
    expected = "the file must be one JSON list, or one JSON object a line"
    try:
        items = json.loads(text)
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
        if line.strip():
            yield where, {"prompt": line.rstrip("\r\n")}


def _csv_records(file: Path, delimiter: str = ",") -> Iterator[Record]:
    """Read cells as they are written: no number, date or missing value is guessed from a text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses prompts over 128 KiB
    rows = csv.reader((line for _, line in _lines(file)), strict=True, delimiter=delimiter)
    sign = {",": "a comma", "\t": "a tab"}[delimiter]
    try:
        header = next(rows, [])
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{file}:1: two columns are called {twice!r}: rename one")
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


def _tsv_records(file: Path) -> Iterator[Record]:
    return _csv_records(file, "\t")


def _parquet_records(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
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
    yield from _dataset_records(table, str(file))


TEXT_FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl_records,
    ".ndjson": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".txt": _text_records,
}
FORMATS = {**TEXT_FORMATS, ".parquet": _parquet_records, ".arrow": _arrow_records}


# -------------------------------------------------------------------------- hub


def _hub_records(source: str, key: str) -> Iterator[Record]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UserError(f"{key}={source!r}: write owner/name, owner/name:split or owner/name:config:split")
    config, split = [None, "train"] if not rest else [None, *rest] if len(rest) == 1 else rest
    try:
        table = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{key}={source!r} is neither a file here nor a dataset that the hub gave ({first_line(error)}): "
            "check the path, or the id and the network"
        ) from error
    yield from _dataset_records(table, source)
