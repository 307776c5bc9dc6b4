"""What a run is doing, and for how long yet: told by which of its files are there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sppo_lightning.evaluation.gate import Decision
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.run_settings import read_settings, reading_settings
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.store.tables import row_count
from sppo_lightning.training.iteration_length import iteration_length
from sppo_lightning.watch.metrics import MetricsTail


class Progress(NamedTuple):
    """Where a run stands."""

    iteration: int  # that it is in, from 0; the number of all of them once it is done
    phase: str
    done: int  # of the phase
    total: int | None  # ``None``: not known
    unit: str


class Schedule:
    """What the settings say of how long a run is.

    Args:
        folder: of the run.

    Raises:
        UserError: if this is no run, or its settings cannot be read.
    """

    def __init__(self, folder: RunFolder) -> None:
        config = read_settings(folder)
        with reading_settings(folder):
            self._read(config["data"])

    def _read(self, data: Mapping[str, Any]) -> None:
        self.iterations = int(data["iterations"])
        self.epochs = int(data.get("epochs_per_iteration") or 1)
        self.fixed_steps = None if (given := data.get("steps_per_iteration")) is None else int(given)
        self.pairs_per_step = int(data["pairs_per_step"])
        self.samples = int(data["samples_per_prompt"])
        self.probe_samples = int(data.get("probe_samples") or self.samples)
        # eval_share holds prompts out where none are named
        self.evaluates = bool(data.get("eval_prompts") or data.get("eval_share"))

    def steps(self, pairs: int) -> int:
        """Return the optimizer steps of an iteration."""
        return iteration_length(
            pairs, pairs_per_step=self.pairs_per_step, epochs=self.epochs, steps=self.fixed_steps
        ).steps


def finished_iterations(folder: RunFolder, metrics: MetricsTail) -> int:
    """Return how many iterations are done: trained, and evaluated where the run evaluates."""
    evaluated = 0
    while (folder.evaluation(f"{evaluated + 1:03d}") / "rollouts.parquet").exists():
        evaluated += 1
    return max(evaluated, len(metrics.column("time/other")))


def progress(
    folder: RunFolder, schedule: Schedule, metrics: MetricsTail, decisions: Sequence[Decision]
) -> Progress:
    """Return where a run stands.

    Raises:
        UserError: if what says it is damaged.
    """
    finished = finished_iterations(folder, metrics)
    if decisions and decisions[-1].action == "stop" and decisions[-1].finished == finished:
        return Progress(finished, "stopped by the gate", finished, schedule.iterations, "iterations")
    if finished >= schedule.iterations:
        return Progress(finished, "finished", finished, schedule.iterations, "iterations")
    store = folder.iteration(finished)
    manifest = store.read_manifest()
    if manifest is None:
        if schedule.evaluates and finished == 0 and not _answered(folder, 0):
            return _evaluating(folder, 0)
        return Progress(finished, "starting", 0, None, "prompts")
    if not manifest["complete"]:
        return _making_data(finished, store, schedule)
    pairs = int(manifest["counts"]["pairs"])
    before = sum(
        schedule.steps(int((folder.iteration(number).read_manifest() or manifest)["counts"]["pairs"]))
        for number in range(finished)
    )
    done = max(0, _last_step(metrics) + 1 - before)
    if done >= schedule.steps(pairs) and schedule.evaluates:
        return _evaluating(folder, finished + 1)
    return Progress(
        finished, "training", min(done, schedule.steps(pairs)), schedule.steps(pairs), "optimizer steps"
    )


def _last_step(metrics: MetricsTail) -> int:
    steps = [int(row["step"]) for row in metrics.rows if "train/loss" in row and "step" in row]
    return steps[-1] if steps else -1


def _answered(folder: RunFolder, finished: int) -> bool:
    return (folder.evaluation(f"{finished:03d}") / "rollouts.parquet").exists()


def _evaluating(folder: RunFolder, finished: int) -> Progress:
    parts = list(folder.evaluation(f"{finished:03d}").glob("parts-*"))
    done = sum(ShardStore(part).count() for part in parts)
    total = row_count(folder.evaluation("000") / "rollouts.parquet")
    return Progress(max(0, finished - 1), "evaluating", done, total or None, "prompts")


def _making_data(number: int, store: IterationStore, schedule: Schedule) -> Progress:
    if not store.difficulty_path.exists():
        return Progress(number, "probing", store.shards.count("probe"), None, "responses")
    if (store.folder / "reference").is_dir():
        return Progress(number, "reference", 0, None, "pairs")
    _, selected = store.read_difficulty()
    done = store.shards.count("topup")
    missing = schedule.samples - (schedule.probe_samples if store.shards.count("probe") else 0)
    total = len(selected) * missing
    # where only some prompts were probed again, others miss more
    return Progress(number, "generating", done, total if total >= max(1, done) else None, "responses")


def seconds_left(folder: RunFolder, schedule: Schedule, metrics: MetricsTail) -> float | None:
    """Return how long a run still takes, going by its finished iterations; ``None`` before the first of them."""
    spans = [
        sum(value for name, value in row.items() if name.startswith("time/"))
        for row in metrics.rows
        if "time/other" in row
    ]
    finished = len(spans)
    if not spans:
        return None
    mean = sum(spans) / finished
    since = time.time() - _changed(folder.iteration(finished - 1).diagnostics_path, folder.metrics)
    return max(0.0, mean * (schedule.iterations - finished) - min(max(0.0, since), mean))


def _changed(*paths: Path) -> float:
    """Return when the first of some files that is there was written last, in seconds of the system's clock."""
    return next(filter(None, map(_written, paths)), time.time())


def _written(path: Path) -> float:
    """Return when a file was written last; 0 where it is not there, or no longer."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def age(folder: RunFolder) -> float:
    """Return how many seconds ago a run last wrote anything."""
    numbers = folder.iteration_numbers()
    newest = [folder.iteration(max(numbers)).folder] if numbers else []
    places = [folder.root, folder.metrics, folder.last_checkpoint, folder.evaluations, folder.iterations]
    for store in newest:
        places += [store, store / "rollouts", store / "reference"]
    for place in folder.evaluations.glob("[0-9]*"):
        places += [place, *place.glob("parts-*")]
    now = time.time()
    return now - (max(map(_written, places)) or now)
