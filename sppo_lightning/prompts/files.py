"""Where records of prompts come from: a file, a glob, a folder, a saved data set, or one of the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from sppo_lightning.paths import expand_path
from sppo_lightning.prompts.formats import FORMATS, Record, dataset_records, file_records, format_of
from sppo_lightning.types import UserError, first_line

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
    try:
        there = path.is_dir()
    except OSError as error:  # a name that no file can have
        raise UserError(f"{key}={source[:80]!r}: no such file ({error.strerror}); check the path") from error
    if there:
        yield from _folder_records(path, None, key)
    elif path.is_file():
        yield from file_records(path, key)
    elif files := sorted(Path(file) for file in glob.glob(text, recursive=True)):
        for file in files:
            yield from file_records(file, key)
    elif (folder := Path(text.rpartition(":")[0])).is_dir() and ":" in text:
        yield from _folder_records(folder, text.rpartition(":")[2], key)
    elif format_of(path) or path.is_absolute() or text.startswith(".") or "*" in text:
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
        files = sorted(file for file in found if file.is_file() and not _is_hidden(file.relative_to(folder)))
        # a text file in a folder is more often a README than prompts
        read = [file for file in files if format_of(file) not in (None, ".txt") and file.name not in ABOUT]
        if read:
            return read, [file for file in files if file not in read]
    return [], files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
        yield from file_records(file, key)


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
    yield from dataset_records(table, str(folder))


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
    yield from dataset_records(table, source)
