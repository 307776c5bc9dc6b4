"""Processes of a run meet through small files in its folder, so that nobody waits in a collective.

Between two training phases one process may have an hour more to do than another. A collective would time out, and keeps
a device busy until then. Files in the folder that all processes share do neither, and say who is late, failed or gone.

A session is one start of the run. Its folder has a random name, so that no file of another start is ever taken for one
of this; ``gather-<number>-<rank>`` holds a process's value of an all-gather.
"""

from __future__ import annotations

import io
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sppo_lightning.system.heartbeat import Heartbeat, unusable
from sppo_lightning.types import Ranks, UserError

T = TypeVar("T")
PATIENCE_S = 300.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0  # between two looks at the folder
GOODBYE_S = 10.0  # that rank zero waits for the others before it removes the session


def open_session(
    sessions: Path,
    *,
    rank: int,
    world_size: int,
    broadcast: Callable[[tuple[str, str]], tuple[str, str]],
    parent: int | None = None,
    patience_s: float = PATIENCE_S,
) -> FileRanks:
    """Start a session below a run's folder: rank zero makes its folder, and one collective tells the others.

    What earlier sessions left is removed once they have been silent for ``patience_s``; younger ones stay, since
    another command may be at work in the same folder.

    Args:
        sessions: the folder of all sessions, in the run's folder.
        rank: this process.
        world_size: processes of the run.
        broadcast: a collective that returns rank zero's value on every rank.
        parent: see :class:`FileRanks`.
        patience_s: see :class:`FileRanks`.

    Raises:
        UserError: on all processes, if the folder cannot be made.
    """
    if world_size == 1:
        return FileRanks(sessions, rank=0, world_size=1)
    name, problem = "", ""
    if rank == 0:
        try:
            name = _new_session(sessions, patience_s)
        except OSError as error:
            problem = unusable(sessions.parent, error)
    name, problem = broadcast((name, problem))
    if problem:
        raise UserError(problem)
    return FileRanks(
        sessions / name,
        rank=rank,
        world_size=world_size,
        parent=parent,
        patience_s=patience_s,
    )


class FileRanks(Ranks):
    """The processes of one session, which meet through files; a process that is alone makes neither file nor thread.

    Meetings are numbered: all processes have to come to the same ones in the same order. What they send may hold None,
    bool, int, float, str, bytes, list, tuple, dict and tensors; tensors arrive on the CPU, detached.

    Args:
        folder: of this session alone.
        rank: this process.
        world_size: processes of the session.
        parent: end this process (status 143) once this is no longer its parent's id; ``None``: keep running. A worker
            whose starter was killed would otherwise sample on, on a device that the next start needs.
        patience_s: seconds without a heartbeat after which a process counts as dead.
        beat_s: seconds between two signs of life.

    Raises:
        UserError: if the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        parent: int | None = None,
        patience_s: float = PATIENCE_S,
        beat_s: float = 2.0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.folder = folder
        self._patience_s = patience_s
        self._number = 0  # of the meeting that was entered last
        self._others = [other for other in range(world_size) if other != rank]
        self._heart = Heartbeat(
            folder, rank=rank, others=self._others, parent=parent, patience_s=patience_s, beat_s=beat_s
        )
        if self._others:
            with self._clear_errors():
                folder.mkdir(parents=True, exist_ok=True)
                self._heart.start()

    # ---------------------------------------------------------------- meetings

    def barrier(self, name: str) -> None:
        """Return once every rank has called it."""
        self._meet(f"barrier {name!r}", None)

    def gather(self, values: list[Any]) -> list[list[Any]]:
        """Return every rank's values, in rank order, on every rank."""
        return self._meet("gather", values)

    def same(self, value: T) -> T:
        """Return rank zero's value on every rank."""
        return cast(T, self._meet("same", value if self.rank == 0 else None)[0])

    def _meet(self, name: str, value: Any) -> list[Any]:
        """Return the value of each process, in rank order, once all are there.

        Raises:
            UserError: if one of them failed, died, left, or came to another meeting; if the folder is unusable.
        """
        if not self._others:
            return [value]
        values = {self.rank: _sendable(value)}
        with self._clear_errors():
            self._number += 1
            self._write(f"gather-{self._number}-{self.rank}", {"name": name, "value": values[self.rank]})
            pause, seen = FIRST_PAUSE_S, set[str]()
            while True:
                before, seen = seen, self._heart.look()
                for other in self._others:
                    file = f"gather-{self._number}-{other}"
                    if other not in values and file in seen:
                        values[other] = self._read(file, name, other)
                missing = [other for other in self._others if other not in values]
                if not missing:
                    break  # whoever failed since then: what all came to, all have alike
                # by the look before this one: what a process wrote before it failed or left has been seen since
                _raise(self._heart.failure(before) or self._heart.loss(missing, before))
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST_PAUSE_S)
            # all are here, so that all have read what was written for the last all-gather
            (self.folder / f"gather-{self._number - 1}-{self.rank}").unlink(missing_ok=True)
        return [values[rank] for rank in range(self.world_size)]

    def _write(self, name: str, content: dict[str, Any]) -> None:
        buffer = io.BytesIO()  # torch's own writer hides the reason why a file cannot be written
        torch.save(content, buffer)
        temporary = self.folder / f".{name}"
        temporary.write_bytes(buffer.getbuffer())
        temporary.rename(self.folder / name)

    def _read(self, file: str, name: str, other: int) -> Any:
        content = torch.load(self.folder / file, weights_only=True, map_location="cpu")
        if content["name"] != name:
            raise UserError(
                f"process {other} has come to {content['name']} where process {self.rank} has come to {name}: start "
                "all processes with the same command, config and version of sppo-lightning"
            )
        return content["value"]

    # ---------------------------------------------------------------- the others

    def check(self) -> None:
        """Return at once, unless another process failed or is gone.

        A thread of its own looks at the folder every few seconds, so that this costs nothing.

        Raises:
            UserError: naming that process, and why.
        """
        _raise(self._heart.trouble)

    def fail(self, message: str) -> None:
        """Tell the others to end, unless one has failed before: its reason is the one that counts.

        Never raises, since it is called where an error is being handled.

        Args:
            message: why; the others see its first line.
        """
        if self._others:
            with suppress(OSError):
                self._heart.fail(message)

    def close(self) -> None:
        """Say goodbye; rank zero waits a few seconds for the others and removes the session.

        After a failure nobody waits, and the folder stays for those that have yet to see it. Never raises.
        """
        if not self._others or self._heart.stopped:
            return
        self._heart.stop()
        with suppress(OSError):
            self._heart.leave()
            if self.rank == 0 and self._all_left():
                _remove_silent(self.folder.parent, self.folder, self._patience_s)
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.parent.rmdir()  # if no other session is in it

    def _all_left(self) -> bool:
        deadline = time.monotonic() + GOODBYE_S
        while time.monotonic() < deadline:
            seen = self._heart.look()
            if self._heart.failure(seen):
                return False
            if self._heart.all_left(seen):
                return True
            time.sleep(10 * FIRST_PAUSE_S)
        return False

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(unusable(self.folder, error)) from error


def _raise(trouble: str) -> None:
    if trouble:
        raise UserError(trouble)


def _new_session(sessions: Path, patience_s: float) -> str:
    name = secrets.token_hex(6)  # not from the run's seed: each start needs another one
    folder = sessions / name
    folder.mkdir(parents=True)
    _remove_silent(sessions, folder, patience_s)
    return name


def _remove_silent(sessions: Path, present: Path, patience_s: float) -> None:
    """Remove the sessions whose folders last changed more than ``patience_s`` before the present one's did.

    A heartbeat changes the folder. Both times come from the file system, not from two machines' clocks.
    """
    now = present.stat().st_mtime
    for folder in sessions.iterdir():
        with suppress(FileNotFoundError):
            if folder != present and now - folder.stat().st_mtime > patience_s:
                shutil.rmtree(folder, ignore_errors=True)


def _sendable(value: Any) -> Any:
    """Return a value as it is sent: tensors on the CPU, and a part of a tensor without the rest of it.

    Raises:
        TypeError: if it holds something that a reader would refuse.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    if type(value) in (list, tuple):
        return type(value)(_sendable(item) for item in value)
    if type(value) is dict:
        return {_sendable(key): _sendable(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"{type(value).__name__} cannot be sent to other processes")
