"""What an arm's pairs do in training, iteration by iteration, from the metrics that its runs logged at each step."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.definition import Study
from sppo_lightning.study.outcomes import Outcome
from sppo_lightning.text import for_markdown

STEP_MEANS = {
    "logratio_chosen": "train/logratios/chosen",
    "logratio_rejected": "train/logratios/rejected",
    "chosen_fell": "train/logratios/chosen_fell",
    "margin": "train/rewards/margin",
    "accuracy": "train/rewards/accuracy",
    "grad_norm": "train/grad_norm",
}
"""Columns, and the metrics that they are the mean of over an iteration's steps."""
Row = dict[str, object]


def training_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return one row for each run and iteration; none of a run whose ``metrics.csv`` is missing or damaged."""
    return [
        {"setting": item.run.setting, "seed": item.run.seed, "arm": item.run.arm, **row}
        for item in outcomes
        for row in read_training(RunFolder(item.run.folder).metrics)
    ]


def read_training(path: Path) -> list[Row]:
    """Return what a run's ``metrics.csv`` says of each iteration's steps; NaN: its loss does not log that.

    Args:
        path: of the file.
    """
    iterations: list[tuple[dict[str, float], list[dict[str, float]]]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                row = {name: float(value) for name, value in line.items() if value}
                if "iteration/number" in row:
                    iterations.append((row, []))
                elif "train/loss" in row and iterations:
                    iterations[-1][1].append(row)
    except (OSError, ValueError, TypeError, csv.Error):
        return []
    return [_summary(first, steps) for first, steps in iterations if steps]


def _summary(first: Mapping[str, float], steps: Sequence[Mapping[str, float]]) -> Row:
    lowest = [row["train/logratios/chosen"] for row in steps if "train/logratios/chosen" in row]
    means = {name: _mean([row[key] for row in steps if key in row]) for name, key in STEP_MEANS.items()}
    return {
        **{"iteration": int(first["iteration/number"]), "steps": len(steps), **means},
        "lowest_logratio_chosen": min(lowest, default=math.nan),
        "gap": first.get("iteration/pairs/gap", math.nan),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def training_section(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the page's lines."""
    if not rows:
        return
    names = {
        "gap": "reward gap",
        "logratio_chosen": "chosen log-ratio",
        "lowest_logratio_chosen": "lowest",
        "chosen_fell": "chosen fell",
        "logratio_rejected": "rejected log-ratio",
        "margin": "margin",
        "accuracy": "accuracy",
        "grad_norm": "gradient norm",
    }
    yield "## What the pairs do in training\n"
    for setting in study.settings:
        here = [row for row in rows if row["setting"] == setting]
        if not here:
            continue
        yield f"| {' | '.join((for_markdown(setting), 'iteration', *names.values()))} |"
        yield "|---" * (2 + len(names)) + "|"
        for arm in study.arms:
            for iteration in sorted({int(str(row["iteration"])) for row in here}):
                of_seeds = [row for row in here if (row["arm"], row["iteration"]) == (arm, iteration)]
                if of_seeds:
                    title = for_markdown(study.title(arm))
                    cells = (_cell(name, of_seeds) for name in names)
                    yield f"| {' | '.join((title, str(iteration), *cells))} |"
        yield ""
    yield (
        "Means over the seeds of the means over an iteration's steps, each step's pairs as it found them. Lowest: "
        "of the steps' mean chosen log-ratios, any seed. Reward gap: of the iteration's pairs. Log-ratios: to the "
        "reference, in nat a response; a chosen one below 0 is displacement: training made the better response less "
        "likely. Chosen fell: share of pairs that this happened to. Margin: as the arm's loss defines a response's "
        "reward, so that it compares arms with one loss. Gradient norm: before clipping. `training.parquet` has each "
        "seed.\n"
    )


def _cell(name: str, rows: Sequence[Row]) -> str:
    values = [float(str(row[name])) for row in rows]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    value = min(known) if name.startswith("lowest") else float(np.mean(known))
    if name in ("chosen_fell", "accuracy"):
        return f"{value:.0%}"
    return f"{value:.2f}" if name in ("gap", "grad_norm") else f"{value:+.2f}"
