"""Runs a study's arms one after the other: what has ended is not run again, a failed one does not stop the others."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml

from sppo_lightning.redaction import masked
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.definition import Study
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.system.lock import RunLock
from sppo_lightning.system.signals import StopSignal
from sppo_lightning.types import Stopped, UserError

Status = Literal["ended", "failed"]
PR_SET_PDEATHSIG = 1
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


def register(study: Study) -> None:
    """Write down what the study names before anything runs, or check that it is still the same.

    Raises:
        UserError: if the folder holds another study, or this one with other arms or claims.
    """
    path = study.folder / "study.json"
    registered = study.registered()
    if not path.exists():
        content = {"digest": study.digest, "registered": time.strftime("%Y-%m-%d"), "study": registered}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return
    try:
        before = json.loads(path.read_bytes())["study"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: restore it, or give the study another output") from error
    changed = [name for name in registered if before.get(name) != registered[name]]
    if changed:
        raise UserError(
            f"{study.folder} holds a study whose {', '.join(changed)} were named otherwise before it ran: put them "
            "back, or give this one another name or output"
        )


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
    pending = [run for run in runs if (found := state_of(study, run)) is None or found.status == "failed"]
    began, failed = time.monotonic(), 0
    _say(
        f"{len(runs)} runs, {len(runs) - len(pending)} of them ended before; they lie in {study.folder / 'runs'}"
    )
    for number, run in enumerate(pending):
        left = (time.monotonic() - began) / number * (len(pending) - number) if number else None
        about = "" if left is None else f"; about {_duration(left)} left"
        _say(
            f"[{len(runs) - len(pending) + number + 1}/{len(runs)}] {run.name}: log in {_log(study, run)}{about}"
        )
        state = _run(study, run)
        write_atomically(_state_file(study, run), json.dumps(asdict(state)).encode())
        if state.status == "failed":
            failed += 1
            _say(f"  failed after {_duration(state.seconds)}: {state.message}")
        else:
            _say(f"  ended after {_duration(state.seconds)}")
            _remove_weights(RunFolder(run.folder))
            ended()
    return failed


def _run(study: Study, run: PlannedRun) -> RunState:
    """Run one ``fit`` to its end, and pass signals on to it."""
    config, log = study.folder / "configs" / f"{run.name}.yaml", _log(study, run)
    if masked(run.config) != run.config:
        raise UserError(
            f"the config of {run.name} holds a secret, which a study would write into its folder: take it from the "
            "environment instead"
        )
    write_atomically(config, yaml.safe_dump(run.config, sort_keys=False).encode())
    log.parent.mkdir(parents=True, exist_ok=True)
    _wait_for_lock(RunFolder(run.folder))
    began = time.monotonic()
    stop = StopSignal()
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", str(config)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it once, through here
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        stop.listen(process.send_signal)
        try:
            code = process.wait()
        except Stopped:
            process.wait()
            raise
        finally:
            stop.ignore()
    seconds = time.monotonic() - began
    if code == 0:
        return RunState("ended", seconds)
    return RunState("failed", seconds, _last_line(log) or f"exit status {code}")


def _end_with_parent() -> None:
    """Have the kernel ask the run to stop where the study is killed: it would train on, unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_lock(folder: RunFolder) -> None:
    """Wait until the run of a study that was killed has stopped."""
    until = time.monotonic() + LOCK_S
    while folder.root.exists() and time.monotonic() < until:
        with suppress(UserError), RunLock(folder.lock):
            return
        time.sleep(0.5)


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
    print(message, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
