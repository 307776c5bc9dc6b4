"""Kills real runs between two changes of their folder, or after a while, by SIGKILL.

What a run leaves behind at a kill is decided by which changes of its folder came before, so that these are the points
worth trying: each file that is opened for writing, renamed, linked or removed.

Run as a program it is a server of runs: it imports everything once, then forks for each run that it reads from its input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = {  # what a change of a file says about where the run stands
    "rollouts/probe": "probe",
    "rollouts/topup": "generate",
    "difficulty.parquet": "select",
    "pairs.parquet": "reference",
    "manifest.json": "manifest",
    "evaluations": "evaluate",
    "checkpoints": "checkpoint",
    "policy": "export",
    "metrics.csv": "train",
    "samples.md": "export",
}


@dataclass(frozen=True)
class Change:
    """One change of a run folder."""

    what: str  # open, rename, link or remove
    path: str  # relative to the run folder

    @property
    def phase(self) -> str:
        """Where the run stood."""
        return next((phase for part, phase in PHASES.items() if part in self.path), "other")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int  # exit status; -9 after a kill
    changes: list[Change]
    output: str


class RunServer:
    """Runs the command line in forked processes, which may be killed at a point.

    Args:
        log: where the runs' output goes.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
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
        kill_at: int | None = None,
        signal_at: int | None = None,
        kill_after: float | None = None,
    ) -> Outcome:
        """Run to the end, or to a point.

        Args:
            arguments: of the command line.
            root: the run folder, whose changes count.
            kill_at: changes before the one at which SIGKILL comes.
            signal_at: changes before the one at which SIGTERM comes.
            kill_after: seconds until SIGKILL comes.
        """
        order = {
            "arguments": list(arguments),
            "root": str(root),
            "kill_at": kill_at,
            "signal_at": signal_at,
            "kill_after": kill_after,
            "log": str(self.log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        changes = [Change(*fields) for fields in answer["changes"]]
        return Outcome(answer["status"], changes, self.log.read_text(errors="replace"))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def serve() -> None:
    """Answer orders until the input ends."""
    from sppo_lightning import cli, run_config  # noqa: F401  everything that a run imports, before the fork
    from sppo_lightning.__main__ import main

    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(main, order, writing)
        os.close(writing)
        with os.fdopen(reading) as told:
            changes = [json.loads(item) for item in told]
        _, status = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "changes": changes}
        print(json.dumps(answer), flush=True)


def _run(main: Any, order: dict[str, Any], told: int) -> None:
    """Be the run; never return."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    root = os.path.realpath(order["root"]) + os.sep
    count = 0

    def watch(event: str, found: tuple[Any, ...]) -> None:
        nonlocal count
        what = {"os.rename": "rename", "os.symlink": "link", "os.remove": "remove"}.get(event)
        if event == "open" and isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR):
            what = "open"
        if what is None or isinstance(found[0], int):
            return
        path = os.path.abspath(os.fspath(found[1] if what in ("rename", "link") else found[0]))
        if not str(path).startswith(root):
            return
        os.write(told, (json.dumps([what, str(path)[len(root) :]]) + "\n").encode())
        if count == order["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if count - 1 == order["signal_at"]:
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(watch)
    if order["kill_after"] is not None:
        threading.Timer(order["kill_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
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
