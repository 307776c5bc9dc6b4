"""The lock of a run folder: one run at a time writes into it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from sppo_lightning.types import UserError

LOGGER = logging.getLogger(__name__)
_TAKEN = {errno.EAGAIN, errno.EACCES}  # the second where a network file system makes flock of other locks
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}  # a link, a folder, a socket
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_WRITTEN = re.compile(rb"(process \d+ on .*|\0*)\s*")  # by a run; zeros where a machine went down
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order in which Lightning asks
# what a launcher sets with a rank; without it Lightning does not take the rank up
_SET_WITH = {
    "RANK": ("TORCHELASTIC_RUN_ID",),
    "GROUP_RANK": ("TORCHELASTIC_RUN_ID",),
    "LOCAL_RANK": ("MASTER_PORT", "WORLD_SIZE"),
    "SLURM_PROCID": ("SLURM_NTASKS",),
    "JSM_NAMESPACE_RANK": ("JSM_NAMESPACE_SIZE",),
}


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this process leads its run; the others are started by it, or next to it by a launcher.

    Args:
        environment: variables of the process, as launchers set them.
    """
    rank = next((environment[name] for name in _RANKS if name in environment), "0")
    node = environment.get("NODE_RANK", environment.get("GROUP_RANK", "0"))
    return int(rank) == 0 and int(node) == 0


def check_ranks(environment: Mapping[str, str], *, nodes: int) -> None:
    """Refuse a rank that no launcher of this run can have set: the process would train without lock, config or policy.

    Args:
        environment: variables of the process.
        nodes: ``trainer.num_nodes``.

    Raises:
        UserError: naming the variable.
    """
    for name in (*_RANKS, "NODE_RANK", "GROUP_RANK"):
        if not environment.get(name, "0").isdecimal():
            raise UserError(f"{name}={environment[name]!r} is no number: unset that environment variable")
        if int(environment.get(name, "0")) == 0:
            continue
        told = any(other in environment for other in _SET_WITH.get(name, ()))
        if not told and (name != "NODE_RANK" or nodes == 1):
            why = "trainer.num_nodes=1" if name == "NODE_RANK" else f"{_SET_WITH[name][0]} is not set"
            raise UserError(
                f"{name}={environment[name]} is set in the environment, but no launcher runs this command ({why}): "
                f"unset {name}, or use a launcher such as torchrun or srun"
            )


class RunLock(AbstractContextManager["RunLock"]):
    """Holds a run folder against other runs, on this machine and on others that share it.

    The kernel gives the lock back when its process ends, however it ends: what a killed run leaves is a file that
    nobody holds. The file's content is for people.

    Args:
        path: the file to lock, in the run folder.
        instead: what else a user can do, for errors.
    """

    def __init__(self, path: Path, *, instead: str = "use another trainer.default_root_dir") -> None:
        self.path = path
        self.instead = instead
        self._descriptor: int | None = None
        # a forked child that outlives its parent would keep holding the lock
        os.register_at_fork(after_in_child=self._forget)

    @property
    def held(self) -> bool:
        """Whether other runs are kept out."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock; where the file system knows no locks, warn and continue without.

        Raises:
            UserError: if another run holds it, or the file is not one that a run has written.
        """
        assert not self.held
        root = self.path.parent
        root.mkdir(parents=True, exist_ok=True)
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _CANNOT_LOCK:
                LOGGER.warning(
                    "%s lies on a file system without locks (%s): see to it that one run at a time writes there",
                    root,
                    error.strerror,
                )
                return
            if error.errno not in _TAKEN:
                raise
            raise UserError(
                f"{root} is in use by another run ({holder or 'which has just begun'}): wait until it has ended, "
                f"or {self.instead}"
            ) from error
        self._descriptor = descriptor
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        with suppress(OSError):  # a full disk: whoever writes what matters will say so
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)

    def _open(self) -> int:
        """Open the file, and refuse one that is not the run's own: it is about to be emptied."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            why = "a link" if error.errno == errno.ELOOP else "no file"
        else:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                why = "no file"
            elif found.st_nlink > 1:
                why = "another name of a file that lies elsewhere"
            elif not _WRITTEN.fullmatch(os.pread(descriptor, 1000, 0)):
                why = "not written by a run"
            else:
                return descriptor
            os.close(descriptor)
        raise UserError(f"{self.path} is {why}: remove it, or {self.instead}")

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            with suppress(OSError):  # the folder's disk may be gone; the lock goes with the descriptor
                os.ftruncate(self._descriptor, 0)
            self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
