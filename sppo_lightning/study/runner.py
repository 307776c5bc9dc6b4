"""Runs a study's arms one after the other: what has ended is not run again, a failed one does not stop the others."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.definition import Study
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.system.lock import RunLock
from sppo_lightning.system.signals import StopSignal
from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError

Status = Literal["ended", "failed"]
PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # not to be looked up after a fork
LOCK_S = 600.0  # that a run of a killed study may take to reach its next optimizer step, and stop


@dataclass(frozen=True)
class RunState:
    """How a run ended.

    Args:
        status: whether its ``fit`` ended well.
        seconds: wall time of the last start.
        message: its last line, where it failed.
    """

    status: Status
    seconds: float
    message: str = ""


def state_of(study: Study, run: PlannedRun) -> RunState | None:
    """Return how a run ended; ``None``: it has not."""
    try:
        return RunState(**json.loads(_state_file(study, run).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def run_all(study: Study, runs: Sequence[PlannedRun], *, ended: Callable[[], object] = lambda: None) -> int:
    """Run what has not ended yet, and return how many failed.

    Args:
        study: what is compared.
        runs: all of the study, or a job's share.
        ended: called after each run.

    Raises:
        Stopped: if a signal came; the run that it met is saved, and continues with the same command.
    """
    pending = [run for run in runs if not _has_ended(study, run)]
    for run in runs:
        if run not in pending:
            _remove_weights(RunFolder(run.folder))  # a kill may have come in between
    began, failed, seconds = time.monotonic(), 0, 0.0
    before = len(runs) - len(pending)
    _say(f"{len(runs)} runs, {before} of them ended before; they lie in {study.folder / 'runs'}")
    for number, run in enumerate(pending):
        left = (time.monotonic() - began) / number * (len(pending) - number) if number else None
        about = "" if left is None else f"; about {_duration(left)} left"
        _say(f"[{before + number + 1}/{len(runs)}] {run.name}: log in {_log(study, run)}{about}")
        if not _wait_for_lock(RunFolder(run.folder)):
            _say("  left to the process that is training it")
            continue
        if _has_ended(study, run):
            _say("  ended in another process")
            continue
        state = _run(study, run)
        seconds += state.seconds
        write_atomically(_state_file(study, run), json.dumps(asdict(state)).encode())
        if state.status == "failed":
            failed += 1
            _say(f"  failed after {_duration(state.seconds)}: {state.message}")
        else:
            _say(f"  ended after {_duration(state.seconds)}")
            _remove_weights(RunFolder(run.folder))
            try:
                ended()
            except UserError as error:  # the other runs do not need it, and it is called again
                _say(f"  {error}")
    if seconds:
        own = time.monotonic() - began - seconds
        _say(f"the runs took {_duration(seconds)}, the study itself {_duration(own)} ({own / seconds:.1%})")
    return failed


def _has_ended(study: Study, run: PlannedRun) -> bool:
    state = state_of(study, run)
    return state is not None and state.status == "ended"


def _run(study: Study, run: PlannedRun) -> RunState:
    """Run one ``fit`` to its end, and pass signals on to it."""
    config, log = study.folder / "configs" / f"{run.name}.yaml", _log(study, run)
    write_atomically(config, yaml.safe_dump(run.config, sort_keys=False).encode())
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    begun: list[subprocess.Popen[bytes]] = []
    stop = StopSignal()
    stop.listen(lambda number: begun[0].send_signal(number) if begun else None)
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", str(config)]
    try:
        with log.open("ab") as output:
            stop.defer()  # until there is a process to pass a signal on to
            begun.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C reaches it once, through here
                    preexec_fn=partial(_end_with_parent, os.getpid()) if _PRCTL is not None else None,
                )
            )
        code = _waited_for(begun[0], stop)
    finally:
        stop.ignore()
    seconds = time.monotonic() - began
    if code == 0:
        return RunState("ended", seconds)
    return RunState("failed", seconds, _last_line(log) or f"exit status {code}")


def _waited_for(process: subprocess.Popen[bytes], stop: StopSignal) -> int:
    """Return a run's exit status; a signal that came meanwhile is raised once the run has saved itself."""
    passed_on = False
    while True:
        try:
            code = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if stop.received and not passed_on:
                passed_on = True
                process.terminate()
            continue
        if stop.received:
            stop.raise_pending()
        return code


def _end_with_parent(study: int) -> None:
    """Have the kernel ask the run to stop where the study is killed: it would train on, unseen.

    Args:
        study: its process id.
    """
    assert _PRCTL is not None
    _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != study:  # it was killed before the kernel was asked
        os._exit(128 + signal.SIGTERM)


def _wait_for_lock(folder: RunFolder) -> bool:
    """Return whether nobody else trains in a run's folder, once the run of a study that was killed has stopped."""
    if not folder.root.exists():
        return True
    until = time.monotonic() + LOCK_S
    while True:
        with suppress(UserError), RunLock(folder.lock):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


@contextmanager
def holding(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold a file's lock; jobs of a study that write the same files take turns.

    Args:
        path: of the lock.
        wait_s: seconds to wait for another process.

    Raises:
        UserError: if it still holds the lock then.
    """
    until = time.monotonic() + wait_s
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(RunLock(path))
                break
            except UserError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)
        yield


def _remove_weights(folder: RunFolder) -> None:
    """Delete what a run of a study needs no longer: its checkpoints and policies, nearly all of its bytes."""
    for place in (folder.last_checkpoint.parent, folder.policy, folder.best, folder.root / "policies"):
        shutil.rmtree(place, ignore_errors=True)


def _state_file(study: Study, run: PlannedRun) -> Path:
    return study.folder / "state" / f"{run.name}.json"


def _log(study: Study, run: PlannedRun) -> Path:
    return study.folder / "logs" / f"{run.name}.log"


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _say(message: str) -> None:
    print(for_terminal(message), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
