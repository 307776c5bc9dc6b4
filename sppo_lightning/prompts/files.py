"""The records of a jsonl, json, csv or Parquet file, or of a hub dataset, and where each one stands."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sppo_lightning.types import UserError, first_line

Record = tuple[str, Mapping[str, Any]]  # where it stands, for error messages; its fields


def records(source: str, *, key: str) -> Iterator[Record]:
    """Yield the records of one source: a file, a glob, a folder, or a hub dataset (``owner/name[:split]``).

    Raises:
        UserError: naming the file and line, if there is no such source or it cannot be read.
    """
    if not source.strip():
        raise UserError(f"{key} is an empty text: name a file, a folder or a hub dataset")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise UserError(f"{key}: folder {source} has no {', '.join(READERS)} file")
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    if files:
        for file in files:
            yield from _file_records(file, key)
    elif path.suffix in READERS or path.is_absolute() or source.startswith(".") or "*" in source:
        raise UserError(f"{key}={source!r}: no such file; check the path (it is relative to {Path.cwd()})")
    else:
        yield from _hub_records(source, key)


def _file_records(file: Path, key: str) -> Iterator[Record]:
    if file.suffix not in READERS:
        raise UserError(f"{key}: {file} is none of {', '.join(READERS)}")
    try:
        yield from READERS[file.suffix](file)
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror or first_line(error)})") from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line stands, and the line with its end."""
    with file.open("rb") as lines:
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
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: broken JSON, {_problem(error)}: each line must be one JSON object"
                ) from error
            yield where, _object(value, where)


def _json_records(file: Path) -> Iterator[Record]:
    text = _text(file.read_bytes(), file, 1)
    if not text.strip():
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{error.lineno}: broken JSON, {_problem(error)}: the file must be one JSON list; for one "
            "record a line use .jsonl"
        ) from error
    if not isinstance(items, list):
        raise UserError(f"{file}: expected a JSON list of prompt records; for one record a line use .jsonl")
    for number, item in enumerate(items, start=1):
        yield f"{file}:record {number}", _object(item, f"{file}:record {number}")


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with a 'prompt' field, got {type(value).__name__}")
    return value


def _problem(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _csv_records(file: Path) -> Iterator[Record]:
    """Read cells as they are written: no number, date or missing value is guessed from a text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses prompts over 128 KiB
    rows = csv.reader((line for _, line in _lines(file)), strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} cells under {len(header)} columns: put quotes around a cell that "
                    "holds a comma"
                )
            if row:
                yield where, {name: cell for name, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: broken CSV, {error}: check the quotes") from error


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


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}


def _hub_records(source: str, key: str) -> Iterator[Record]:
    import datasets

    name, _, split = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{key}={source!r} is neither a file here nor a dataset that the hub gave ({first_line(error)}): "
            "check the path, or the id and the network"
        ) from error
    for row, fields in enumerate(table, start=1):
        yield f"{source}:row {row}", fields
