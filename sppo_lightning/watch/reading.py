"""A run as it is seen at one moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sppo_lightning.evaluation.gate import Decision, read_decisions
from sppo_lightning.evaluation.results import HeldOutResult, held_out_results
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError
from sppo_lightning.watch.metrics import MetricsTail
from sppo_lightning.watch.progress import Progress, Schedule, age, progress, seconds_left

T = TypeVar("T")


class IterationView(NamedTuple):
    """One iteration whose data is complete."""

    number: int
    reward: float  # mean over its prompts
    difficulty: float  # mean
    selected: int
    pairs: int
    dropped: Mapping[str, int]  # prompts by reason


class RunView(NamedTuple):
    """What there is to see."""

    name: str
    planned: int  # iterations
    progress: Progress | None  # ``None``: what says it is damaged
    age: float  # seconds since anything was written
    seconds_left: float | None
    iterations: list[IterationView]
    results: list[HeldOutResult]
    decisions: list[Decision]
    losses: list[float]  # of the optimizer steps that were logged
    troubles: list[str]  # what cannot be read, a line each


class RunReader:
    """Looks at a run again and again; what has not changed is not read again.

    Args:
        root: the run's folder.

    Raises:
        UserError: if this is no run, or its settings cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        self.schedule = Schedule(self.folder)
        self._metrics = MetricsTail(self.folder.metrics)
        self._iterations: dict[int, IterationView] = {}
        self._results: list[HeldOutResult] = []
        self._measured: object = None  # which evaluations there are

    def read(self) -> RunView:
        """Return the run as it is now."""
        self._metrics.update()
        troubles: list[str] = []
        decisions = _tried(lambda: read_decisions(self.folder), troubles) or []
        now = _tried(lambda: progress(self.folder, self.schedule, self._metrics, decisions), troubles)
        for number in self.folder.iteration_numbers():
            if number not in self._iterations:
                view = _tried(partial(self._iteration, number), troubles)
                if view is not None:
                    self._iterations[number] = view
        return RunView(
            name=self.folder.root.resolve().name,
            planned=self.schedule.iterations,
            progress=now,
            age=age(self.folder),
            seconds_left=seconds_left(self.folder, self.schedule, self._metrics),
            iterations=[self._iterations[number] for number in sorted(self._iterations)],
            results=_tried(self._held_out, troubles) or [],
            decisions=decisions,
            losses=self._metrics.column("train/loss"),
            troubles=troubles,
        )

    def _iteration(self, number: int) -> IterationView | None:
        manifest: dict[str, Any] | None = self.folder.iteration(number).read_manifest()
        if manifest is None or not manifest["complete"]:
            return None
        counts, metrics = manifest["counts"], manifest["metrics"]
        return IterationView(
            number,
            metrics["iteration/reward/mean"],
            metrics["iteration/difficulty/mean"],
            counts["selected"],
            counts["pairs"],
            manifest["dropped"],
        )

    def _held_out(self) -> list[HeldOutResult]:
        places = sorted(self.folder.evaluations.glob("[0-9][0-9][0-9]/rollouts.parquet"))
        found = [(place, place.stat().st_mtime_ns) for place in places]
        if found != self._measured:
            self._results = held_out_results(self.folder, self.schedule.iterations)
            self._measured = found
        return self._results


def _tried(read: Callable[[], T], troubles: list[str]) -> T | None:
    """Return what is read; ``None``, and a line in ``troubles``, if it cannot be."""
    try:
        return read()
    except (UserError, OSError) as error:
        line = str(error)
        if line not in troubles:
            troubles.append(line)
        return None
