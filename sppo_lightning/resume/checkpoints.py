"""Checkpoints on disk: written whole under a new name, then switched to, so that the last good one is always there."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from sppo_lightning.system.durable import (
    changed_files,
    disk_error,
    record_sizes,
    replacing,
    sync_folder,
    sync_tree,
)
from sppo_lightning.types import UserError, first_line

PART = "step-"  # begins the names of sharded checkpoints

METADATA = (
    ".metadata"  # in a folder of shards: which tensors lie where, pickled by torch.distributed.checkpoint
)
_IN_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what torch writes into a checkpoint's metadata: any other name may run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of those, or a dtype."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _IN_METADATA.get(module, ()):
            raise UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")
        return super().find_class(module, name)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint's file straight to disk, and gives it its name once all of it is there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, replacing the one that is there.

        Raises:
            UserError: if the disk is full or cannot be written; the one that was there stays.
        """
        if "://" in str(path):  # of a user's own callback, on a file system that is none of ours
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        assert storage_options is None
        with replacing(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except (
                RuntimeError
            ) as error:  # torch closes its archive after a failed write, and complains of that
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint's file.

        Raises:
            UserError: if it is a folder of parts, which only processes that share the weights can read.
        """
        if Path(path).is_dir():
            raise UserError(
                f"{path} holds weights that were sharded over processes: continue with trainer.strategy "
                "ModelParallelStrategy, on any number of processes"
            )
        return super().load_checkpoint(str(path), map_location, weights_only)


def state_file(path: Path) -> Path:
    """Return the file that holds a checkpoint's state: all of it, or, of a sharded one, all but the weights."""
    return path / "meta.pt" if path.is_dir() else path


def sharded_path(last: Path, step: int) -> Path:
    """Return where a sharded checkpoint is to be written, free of what a killed run has left there.

    Args:
        last: the run's last checkpoint, next to which it goes.
        step: optimizer steps taken before it.
    """
    path = last.with_name(f"{PART}{step:08d}")
    if last.resolve() == path.resolve():  # written twice in a step: once trained, once evaluated
        path = path.with_name(f"{path.name}-end")
    shutil.rmtree(path, ignore_errors=True)
    return path


def switch_to_sharded(last: Path, shards: Path) -> None:
    """Let ``last`` be a relative link to a folder of shards that has been written, and remove the folders before it."""
    sync_tree(shards)
    record_sizes(shards)
    link = last.with_name(f".{last.name}.new")
    link.unlink(missing_ok=True)
    link.symlink_to(shards.name, target_is_directory=True)
    if last.is_dir() and not last.is_symlink():  # copied from elsewhere, its link followed
        last.rename(last.with_name(f"{PART}copied"))
    link.replace(last)
    sync_folder(last.parent)
    for other in last.parent.glob(f"{PART}*"):
        if other != shards:
            shutil.rmtree(other, ignore_errors=True)


_DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    UnpicklingError,
)


FOLDER = 0x10  # among a zip entry's attributes


BLOCK = 2**22  # bytes of a checkpoint read at once


def check_checkpoint(path: Path, name: str) -> None:
    """Refuse a checkpoint that is missing or cut short, before the model loads.

    Raises:
        UserError: naming the path.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{name}={str(path)!r} is a link to {path.readlink()}, which is gone: restore that folder, or name another "
            "checkpoint with --ckpt_path"
        )
    if not path.exists():
        raise UserError(
            f"{name}={str(path)!r}: no such file; check the path (it is relative to {Path.cwd()})"
        )
    file = state_file(path)
    if not (file.is_file() and zipfile.is_zipfile(file)):
        raise UserError(
            f"{name}={str(path)!r} is no checkpoint, or was cut short: restore it from a copy, or name another "
            "with --ckpt_path"
        )
    check_sharded_metadata(path)


def check_sharded_metadata(folder: Path) -> None:
    """Refuse a sharded checkpoint's metadata that would run code: torch unpickles it, whatever it holds.

    Raises:
        UserError: naming the file. Nothing is said where there is none: the sizes of a checkpoint's files tell.
    """
    path = folder / METADATA
    if not path.is_file():
        return
    try:
        _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a pickle of somebody else can raise anything
        if disk_error(error, path) is not None:
            raise
        raise _damaged_checkpoint(path, first_line(error)) from error


def verify_checkpoint(path: Path) -> None:
    """Read all of a checkpoint and compare its checksums, which loading does not: a second for each 3 GB.

    Of a sharded checkpoint, the part that holds the run's state is read, and the sizes of the others are compared.

    Raises:
        UserError: naming the file that is damaged.
    """
    _verify_archive(state_file(path))
    if path.is_dir():
        why = changed_files(path)
        if why is not None:
            raise _damaged_checkpoint(path, why)


def _verify_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.external_attr & FOLDER:  # torch would load whatever lies in its memory
                    raise zipfile.BadZipFile(f"{entry.filename} is marked as a folder")
                with archive.open(entry) as content:
                    while content.read(BLOCK):
                        pass
        torch.load(
            path, map_location="cpu", mmap=True, weights_only=True
        )  # reads more of the archive's own tables
    except _DAMAGED_ZIP as error:
        if disk_error(error, path) is not None:
            raise
        raise _damaged_checkpoint(path, first_line(error)) from error


def _damaged_checkpoint(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why}): restore it from a copy, or start anew in another trainer.default_root_dir; "
        "nothing has been changed"
    )
