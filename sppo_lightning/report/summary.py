"""All that the report says but the prompts and responses, as plain containers; the content of ``--format json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sppo_lightning import __version__
from sppo_lightning.report.comparison import differences, differing_settings
from sppo_lightning.report.difficulty_views import QUARTILES, gain_by_quartile, histogram, moves, outcomes
from sppo_lightning.report.estimates import INTERVAL, Estimate
from sppo_lightning.report.held_out import MEASURES, held_out_points
from sppo_lightning.report.run_data import Curve, Iteration, RunData, section
from sppo_lightning.report.settings import flat_settings
from sppo_lightning.report.study_folder import StudyData
from sppo_lightning.training.iteration_length import iteration_length

FORMAT = 1
POINTS = 600  # of a curve; longer ones are averaged
PHASES = ("probing", "generating", "evaluating", "scoring", "reference", "training", "other")
TRAINING = "train/"


def summary(runs: Sequence[RunData], study: StudyData | None = None) -> dict[str, Any]:
    """Return the report of some runs; numbers that are not known are ``None``.

    Args:
        runs: later ones are compared with the first.
        study: that they belong to.
    """
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "interval": INTERVAL,
        "measures": {name: measure._asdict() for name, measure in MEASURES.items()},
        "quartiles": list(QUARTILES),
        "runs": [_run(run) for run in runs],
        "comparison": None,
        "study": None if study is None else study.content(),
    }
    if len(runs) > 1:
        found["comparison"] = {
            "differences": [one._asdict() for one in differences(runs)],
            "settings": differing_settings(runs),
        }
    cleaned: dict[str, Any] = _cleaned(found)
    return cleaned


def _run(run: RunData) -> dict[str, Any]:
    points = held_out_points(run)
    shapes = histogram(run.iterations)
    gains = gain_by_quartile(run.iterations)
    return {
        "name": run.name,
        "finished": run.finished,
        "planned": run.planned,
        "started": run.starts[0].get("time") if run.starts else None,
        "starts": list(run.starts),
        "seed": run.config.get("seed_everything"),
        "settings": flat_settings(run.config),
        "held_out_prompts": len(run.evaluations[0].rows) if run.evaluations else 0,
        "held_out": [point._asdict() for point in points],
        "difficulty": None if shapes is None else shapes._asdict(),
        "moves": [one._asdict() for one in moves(run.iterations)],
        "gain_by_quartile": None
        if gains is None
        else dict(zip(("before", "after", "gains"), gains, strict=True)),
        "iterations": [
            {
                "iteration": one.number,
                "complete": one.complete,
                "counts": one.counts,
                "outcomes": outcomes(one),
                "metrics": one.metrics,
                "diagnostics": one.diagnostics,
            }
            for one in run.iterations
        ],
        "curves": {
            name.removeprefix(TRAINING): thinned(curve)
            for name, curve in run.curves.items()
            if name.startswith(TRAINING)
        },
        "iteration_steps": dict(zip(*_iteration_steps(run), strict=True)),
        "decisions": [{**one.state(), "policy": one.policy} for one in run.decisions],
        "phases": list(_phases(run)),
        "missing": run.reader.missing,
    }


def _iteration_steps(run: RunData) -> tuple[list[int], list[int]]:
    """Return the iterations, and the optimizer step that each one starts at."""
    steps, numbers = run.curves.get("iteration/number", ([], []))
    return [int(number) for number in numbers], steps


def thinned(curve: Curve) -> Curve:
    """Return a curve of at most :data:`POINTS` points, in the order of its steps; neighbours are averaged."""
    ordered = sorted((step, value) for step, value in zip(*curve, strict=True) if math.isfinite(value))
    size = max(1, len(ordered))
    bounds = (
        sorted({size * number // POINTS for number in range(POINTS + 1)})
        if size > POINTS
        else range(size + 1)
    )
    parts = [ordered[start:end] for start, end in pairwise(bounds) if ordered[start:end]]
    return (
        [part[len(part) // 2][0] for part in parts],
        [math.fsum(value for _, value in part) / len(part) for part in parts],
    )


def _phases(run: RunData) -> Iterator[dict[str, Any]]:
    """Yield seconds and tokens of each phase of an iteration.

    Times are logged once an iteration, when it ends, all at the same optimizer step.
    """
    ends = run.curves.get("time/other", ([], []))[0]
    seconds = {phase: dict(zip(*run.curves.get(f"time/{phase}", ([], [])), strict=True)) for phase in PHASES}
    answered = {one.finished: sum(row.length for row in one.rows) for one in run.evaluations}
    for place, iteration in enumerate(run.iterations):
        tokens = {**iteration.tokens, "evaluating": answered.get(iteration.number + 1, 0)}
        if iteration.number == 0:
            tokens["evaluating"] += answered.get(0, 0)
        tokens["training"] = round(tokens.get("training", 0) * _passes(run, iteration))
        for phase in PHASES:
            known = seconds[phase].get(ends[place]) if place < len(ends) else None
            if known is not None or tokens.get(phase):
                yield {
                    "iteration": iteration.number,
                    "phase": phase,
                    "seconds": known,
                    "tokens": tokens.get(phase) or None,
                }


def _passes(run: RunData, iteration: Iteration) -> float:
    """Return how often an iteration's pairs are trained on; 1 where the settings do not say."""
    data = section(run.config, "data")
    pairs, per_step = int(iteration.counts.get("pairs", 0)), data.get("pairs_per_step")
    epochs, steps = data.get("epochs_per_iteration", 1), data.get("steps_per_iteration")
    if not pairs or not isinstance(per_step, int) or per_step < 1 or not isinstance(epochs, int):
        return 1.0
    steps = steps if isinstance(steps, int) else None
    return iteration_length(pairs, pairs_per_step=per_step, epochs=epochs, steps=steps).pairs / pairs


def _cleaned(value: Any) -> Any:
    """Return containers that JSON can hold: estimates by name, no number that is not finite, text keys."""
    if isinstance(value, Estimate):
        return {name: _cleaned(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
