"""Ends real runs by a signal at a point: between two changes of their folder, inside a phase, or after a while.

What a run leaves behind at a kill is decided by which changes of its folder came before, so that these are the points
worth trying: each file or folder that is made, opened for writing, renamed, linked or removed. :class:`Marks` adds
those in between, at which nothing changes on disk.

Run as a program it is a server of runs: it imports everything once, then forks for each run that its input names.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl

from sppo_lightning.callbacks import SelfPlayCallback
from sppo_lightning.types import PhaseProgress

PHASES = {  # what a point's path begins with, and where the run stands there
    r"(training|step)/": "train",
    r"probing/": "probe",
    r"generating/": "generate",
    r"scoring/": "score",
    r"reference/": "reference",
    r"(evaluating/|evaluations)": "evaluate",
    r"iterations/\d+/rollouts(/probe|$)": "probe",
    r"iterations/\d+/rollouts/topup": "generate",
    r"iterations/\d+/difficulty": "select",
    r"iterations/\d+/(pairs|manifest|reference)": "reference",
    r"iterations": "between iterations",
    r"checkpoints": "checkpoint",
    r"(\.?polic(y|ies)|samples\.md)": "export",
    r"metrics\.csv": "train",
    r"": "start",
}
TEMPORARY = re.compile(r"^\.(.+)\.\d+\.tmp$")
AUDITED = {"os.rename": 1, "os.symlink": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}
"""Which argument of an event is the path that changes."""


@dataclass(frozen=True)
class Change:
    """One change of a run folder, or, where ``what`` is ``reach``, a point that the run has come to."""

    what: str  # open, rename, symlink, remove, mkdir, rmdir or reach
    path: str  # relative to the run folder

    @property
    def final(self) -> str:
        """The path, of a temporary file the one that it is to have."""
        path = Path(self.path)
        return str(path.with_name(TEMPORARY.sub(r"\1", path.name)))

    @property
    def is_shard(self) -> bool:
        """Whether a rollout shard takes its name."""
        return self.what == "rename" and re.search(r"-\d{5}\.parquet$", self.path) is not None


def phases(changes: Iterable[Change]) -> list[str]:
    """Return where a run stood at each of its changes."""
    named: set[str] = set()
    found = []
    for change in changes:
        phase = next(phase for path, phase in PHASES.items() if re.match(path, change.final))
        if phase in ("probe", "generate") and change.final in named:
            phase = "score"  # a shard is written once unscored, and once scored
        if change.final.endswith("manifest.json") and phase == "reference" and change.final not in named:
            phase = "between iterations"  # its first words; the others end the iteration's data
        found.append(phase)
        if change.what == "rename":
            named.add(change.final)
    return found


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int  # exit status; -9 after a kill
    changes: list[Change]
    at: int | None  # the one before which a signal came
    output: str
    seconds: float

    @property
    def done(self) -> list[Change]:
        """The changes without the one that a signal ended."""
        ended = self.at if self.status != 0 else None
        return [change for n, change in enumerate(self.changes) if n != ended or change.what == "reach"]

    @property
    def shards(self) -> list[str]:
        """The rollout shards that were written, as often as they were."""
        return [change.path for change in self.done if change.is_shard]

    @property
    def steps(self) -> list[int]:
        """The numbers of the optimizer steps that were taken."""
        return [int(change.path.partition("/")[2]) for change in self.done if change.path.startswith("step/")]


class Marks(SelfPlayCallback):
    """Names points at which nothing changes on disk: each prompt, pair, micro-batch and optimizer step."""

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Mark progress inside a phase."""
        sys.audit("crashing.reach", f"{progress.phase}/{progress.done}")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Mark a micro-batch."""
        sys.audit("crashing.reach", f"training/{trainer.global_step}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark an optimizer step."""
        if batch is not None and batch.slot.last_in_step:
            sys.audit("crashing.reach", f"step/{trainer.global_step - 1}")


class RunServer:
    """Runs the command line in forked processes, which may be ended at a point.

    Args:
        log: where the runs' output goes.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        here = Path(__file__).resolve().parent
        path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def run(
        self,
        arguments: Sequence[str],
        root: Path,
        *,
        at: int | None = None,
        after: float | None = None,
        by: signal.Signals = signal.SIGKILL,
    ) -> Outcome:
        """Run to the end, or to a point.

        Args:
            arguments: of the command line.
            root: the run folder, whose changes count.
            at: changes before the one at which the signal comes.
            after: seconds until the signal comes.
            by: the signal.
        """
        order = {
            "arguments": list(arguments),
            "root": str(root),
            "at": at,
            "after": after,
            "by": int(by),
            "log": str(self.log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        changes = [Change(*fields) for fields in answer["changes"]]
        output = self.log.read_text(errors="replace")
        return Outcome(answer["status"], changes, at, output, answer["seconds"])

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def watch(root: Path, tell: Callable[[Change], None]) -> None:
    """Have ``tell`` called before each change below ``root`` that this process makes from now on, to its end."""
    below = os.path.realpath(root) + os.sep

    def heed(event: str, found: tuple[Any, ...]) -> None:
        if event == "crashing.reach":
            tell(Change("reach", found[0]))
        elif event == "open":
            if (
                isinstance(found[2], int)
                and found[2] & (os.O_WRONLY | os.O_RDWR)
                and not isinstance(found[0], int)
            ):
                look("open", found[0])
        elif event in AUDITED:
            look(event.partition(".")[2], found[AUDITED[event]], *_folder(event, found))

    def look(what: str, path: Any, folder: int = -1) -> None:
        within = f"/proc/self/fd/{folder}" if folder >= 0 else "."
        place = os.path.join(os.path.realpath(within), os.fsdecode(path))
        if place.startswith(below) and not (what == "mkdir" and os.path.exists(place)):
            tell(Change(what, place[len(below) :]))

    sys.addaudithook(heed)


def _folder(event: str, found: tuple[Any, ...]) -> list[int]:
    """Return the descriptor of the folder that an event's path is relative to, if it names one."""
    return (
        [found[-1]] if isinstance(found[-1], int) and event in ("os.remove", "os.rmdir", "os.mkdir") else []
    )


def serve() -> NoReturn:
    """Answer orders until the input ends."""
    from sppo_lightning.__main__ import main
    from sppo_lightning.cli import main as cli  # noqa: F401  everything that a run imports, before the fork
    from sppo_lightning.resume import run_config  # noqa: F401  everything that a run imports, before the fork

    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        begun = time.perf_counter()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(main, order, writing)
        os.close(writing)
        with os.fdopen(reading) as told:
            changes = [json.loads(item) for item in told]
        _, status = os.waitpid(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "changes": changes,
            "seconds": time.perf_counter() - begun,
        }
        print(json.dumps(answer), flush=True)
    sys.exit()


def _run(main: Callable[[list[str]], None], order: dict[str, Any], told: int) -> NoReturn:
    """Be the run."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def tell(change: Change) -> None:
        nonlocal count
        os.write(told, (json.dumps([change.what, change.path]) + "\n").encode())
        count += 1
        if count - 1 == order["at"]:
            os.kill(os.getpid(), order["by"])

    watch(Path(order["root"]), tell)
    if order["after"] is not None:
        threading.Timer(order["after"], os.kill, (os.getpid(), order["by"])).start()
    status = 1
    try:
        main(order["arguments"])
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
