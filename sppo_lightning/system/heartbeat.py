"""Signs of life: which of the processes that share a folder are alive, have failed or are done.

In the folder lie ``alive-<rank>-<count>``, renamed every few seconds; ``failed-<rank>``, why a process failed; and
``left-<rank>``: it is done. No clock is compared with another machine's: a process is alive while its file changes.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sppo_lightning.types import first_line

FRESH_S = 1.0  # a process's own rename, so long ago or less, makes a client of NFS read the folder anew
ORPHANED = 143  # exit status of a process whose parent died: as if SIGTERM had ended it
RESUMES = "the same command resumes from what is stored"
SHARED = "trainer.default_root_dir must be a folder that all nodes share and may write to"


class Heartbeat:
    """One process's heartbeats, given by a thread of its own, and what that thread sees of the others.

    Args:
        folder: of one session; exists.
        rank: this process.
        others: ranks of the others.
        parent: end this process (status 143) once this is no longer its parent's id; ``None``: never.
        patience_s: seconds without a heartbeat after which a process counts as dead.
        beat_s: seconds between two heartbeats.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        others: Sequence[int],
        parent: int | None,
        patience_s: float,
        beat_s: float,
    ) -> None:
        self.trouble = ""  # who failed or is gone, as the thread saw it last; empty: nobody
        self._folder = folder
        self._rank = rank
        self._others = others
        self._parent = parent
        self._patience_s = patience_s
        self._beat_s = beat_s
        self._last_beats: dict[int, str] = {}  # the last that was seen of each process
        self._silence_s = dict.fromkeys(others, 0.0)
        self._beats = 0
        self._beaten_at = 0.0
        self._beating = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat, and more until stopped."""
        self._alive.touch()
        self._thread.start()

    def stop(self) -> None:
        """End the heartbeats."""
        self._stopping.set()
        self._thread.join()

    @property
    def stopped(self) -> bool:
        """Whether the heartbeats have been ended."""
        return self._stopping.is_set()

    def look(self) -> set[str]:
        """Return the names of the files in the folder, as they are now."""
        if time.monotonic() - self._beaten_at > FRESH_S:
            self._beat()
        return set(os.listdir(self._folder))

    def fail(self, message: str) -> None:
        """Tell the others to end, unless one has failed before: its reason is the one that counts."""
        if self.failure(self.look()):
            return
        temporary = self._folder / f".failed-{self._rank}"
        temporary.write_text(message.strip().partition("\n")[0] or "no reason given", encoding="utf-8")
        temporary.rename(self._folder / f"failed-{self._rank}")

    def leave(self) -> None:
        """Tell the others that this process is done."""
        (self._folder / f"left-{self._rank}").touch()

    def all_left(self, seen: set[str]) -> bool:
        """Whether all others are done; ``seen``: the names of the files in the folder."""
        return all(f"left-{other}" in seen for other in self._others)

    def failure(self, seen: set[str]) -> str:
        """Return who failed and why; empty: nobody did; ``seen``: the names of the files in the folder."""
        for name in sorted(seen):
            if name.startswith("failed-"):
                reason = (self._folder / name).read_text(encoding="utf-8")
                return f"process {name.split('-')[1]} failed: {reason}"
        return ""

    def loss(self, others: Sequence[int], seen: set[str]) -> str:
        """Return which of ``others`` is gone, and why; empty: none; ``seen``: the names of the files in the folder."""
        for other in others:
            if f"left-{other}" in seen:
                return f"process {other} has ended, while process {self._rank} has not: {RESUMES}"
            if self._silence_s[other] > self._patience_s:
                if other in self._last_beats:
                    return f"process {other} has given no heartbeat for {self._patience_s:g} s: {RESUMES}"
                return (
                    f"process {self._rank} has seen nothing of process {other} in {self._folder} for "
                    f"{self._patience_s:g} s: {SHARED}"
                )
        return ""

    @property
    def _alive(self) -> Path:
        return self._folder / f"alive-{self._rank}-{self._beats}"

    def _beat(self) -> None:
        with self._beating:
            last = self._alive
            self._beats += 1
            try:
                last.rename(self._alive)
            except FileNotFoundError:  # an NFS server may have renamed it and its answer was lost
                self._alive.touch()
            self._beaten_at = time.monotonic()

    def _live(self) -> None:
        looked_at = time.monotonic()
        while not self._stopping.wait(self._beat_s):
            if self._parent is not None and os.getppid() != self._parent:
                self._end_as_orphan()
            try:
                self._beat()
                seen = set(os.listdir(self._folder))
                failure = self.failure(seen)
            except FileNotFoundError as error:
                self.trouble = unusable(self._folder, error)
                continue
            except (
                OSError
            ):  # if it lasts, the next meeting says so; who cannot look knows nothing of the others
                looked_at = time.monotonic()
                continue
            now = time.monotonic()
            # time in which this process was suspended is not the others' silence
            self._listen(seen, min(now - looked_at, 2 * self._beat_s))
            looked_at = now
            self.trouble = failure or self.loss(self._others, seen)

    def _listen(self, seen: set[str], elapsed_s: float) -> None:
        beats = {int(name.split("-")[1]): name for name in seen if name.startswith("alive-")}
        for other in self._others:
            changed = other in beats and beats[other] != self._last_beats.get(other)
            self._silence_s[other] = 0.0 if changed else self._silence_s[other] + elapsed_s
        self._last_beats |= beats

    def _end_as_orphan(self) -> None:
        reason = "the process that started it is gone"
        with suppress(OSError):
            self.fail(reason)
        print(f"sppo-lightning: process {self._rank} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(ORPHANED)


def unusable(folder: Path, error: OSError) -> str:
    """Return what to tell a user whose processes cannot meet in a folder."""
    if error.errno == errno.ENOENT:
        return f"{folder} is gone, in which the processes of this run meet: {SHARED}; {RESUMES}"
    reason = error.strerror or first_line(error)
    return f"the processes of this run cannot meet in {folder} ({reason}): {SHARED}"
