"""Files that are whole or absent, also after a crash, and what to do where the disk refuses or a file is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from sppo_lightning.types import UserError

LOGGER = logging.getLogger(__name__)
SIZES = "sizes.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, also after a crash.

    Raises:
        UserError: if the disk is full or out of reach.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name once it is whole and on disk; until then the old one stays.

    Raises:
        UserError: if the disk is full or out of reach.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _make_folder(path.parent)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        message = disk_error(error, path)
        if message is None:
            raise
        raise message from error


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk, where the file system can: a rename is not safe before."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_readable(folder: Path) -> None:
    """Give a folder's files the mode of any new file; safetensors 0.8 lets their owner alone read them."""
    masked = os.umask(0o077)
    os.umask(masked)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~masked)


def sync_tree(folder: Path) -> None:
    """Put all files below a folder on disk, and their names."""
    for place in (folder, *folder.rglob("*")):
        if place.is_dir():
            sync_folder(place)
        else:
            with place.open("rb") as content:
                os.fsync(content.fileno())


def replace_folder(folder: Path, fresh: Path) -> None:
    """Let a folder that is whole take another's name and place; :func:`restore_replaced` mends a kill in between."""
    stale = _stale(folder)
    sync_tree(fresh)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def fresh_folder(folder: Path, *, clear: bool) -> Path:
    """Return the name under which :func:`replace_folder`'s new folder is written.

    Args:
        folder: to be replaced.
        clear: remove what a killed run left; by one process.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    for leftover in (fresh, _stale(folder)) if clear else ():
        shutil.rmtree(leftover, ignore_errors=True)
    return fresh


def restore_replaced(folder: Path) -> None:
    """Put back a folder that a killed :func:`replace_folder` was about to replace."""
    if not folder.exists() and _stale(folder).exists():
        _stale(folder).rename(folder)


def link_weights(source: str, target: str) -> str:
    """Link a file of weights, which nobody writes into, and copy any other; for :func:`shutil.copytree`."""
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return target
    return shutil.copy2(source, target)


def _stale(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _make_folder(folder: Path) -> None:
    fresh = list(takewhile(lambda place: not place.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for place in fresh:
        sync_folder(place.parent)


def disk_error(error: BaseException, path: Path) -> UserError | None:
    """Return what to tell a user about a disk that is full or out of reach; ``None``: it is another error.

    Args:
        error: that came up while reading or writing.
        path: what was to be read or written.
    """
    if not isinstance(error, OSError) or error.errno not in _FULL | _REFUSED:
        return None
    if error.errno in _FULL:
        return UserError(
            f"{path} cannot be written ({error.strerror}; {_free_space(path)}): make room, then give the same command "
            "again: it resumes from what is stored"
        )
    return UserError(
        f"{path} cannot be read or written ({error.strerror}): mend its folder (permissions, disk), then give the "
        "same command again: it resumes from what is stored"
    )


def _free_space(path: Path) -> str:
    try:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        return f"{shutil.disk_usage(place).free / 1e6:,.0f} MB free"
    except OSError:
        return "free space unknown"


def quarantine(path: Path) -> None:
    """Rename a damaged file to ``<name>.damaged``, so that nothing is lost, and say so."""
    taken = [place.name for place in path.parent.glob(f"{path.name}.damaged*")]
    kept = path.with_name(f"{path.name}.damaged" + (f"-{len(taken) + 1}" if taken else ""))
    path.rename(kept)
    LOGGER.warning("%s is damaged: it is kept as %s and made anew", path, kept.name)


def record_sizes(folder: Path) -> None:
    """Write down how large a folder's files are, for :func:`changed_files`."""
    write_atomically(folder / SIZES, with_checksum(_sizes(folder)))


def changed_files(folder: Path) -> str | None:
    """Return what is no longer as :func:`record_sizes` found it, in words; ``None``: all is, or nothing was written."""
    if not (folder / SIZES).exists():
        return None
    try:
        before = read_checksummed((folder / SIZES).read_bytes())
    except ValueError as error:
        return f"{SIZES}: {error}"
    now = _sizes(folder)
    changed = [name for name in before if now.get(name) != before[name]]
    return f"{', '.join(changed)} gone or cut short" if changed else None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SIZES}


def with_checksum(content: Mapping[str, Any]) -> bytes:
    """Return JSON that knows its own digest, so that no flipped bit goes unnoticed."""
    plain = json.loads(json.dumps(content))  # with the keys and numbers that a reader will find
    return json.dumps({**plain, "digest": _digest(plain)}, indent=2, sort_keys=True).encode()


def read_checksummed(content: bytes) -> dict[str, Any]:
    """Return what :func:`with_checksum` wrote; JSON without a digest is taken as it is.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    digest = found.pop("digest", None)
    if digest not in (None, _digest(found)):
        raise ValueError("its content and its digest differ")
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
