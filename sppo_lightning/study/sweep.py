"""Sweeps: a study whose arms are the values of one setting of a user's own ``fit`` config, to choose one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_lightning.study.definition import Arm, Overrides, Study, read_settings
from sppo_lightning.types import UserError

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Parameter:
    """A setting that can be swept.

    Args:
        question: that the page opens with.
        values: where none are given.
        bounds: lower, excluded, and upper, included.
        baseline: value that leaves the data as it is, which the choice is compared with.
        config: overrides of the config for a value.
        title: of a value, in tables.
    """

    question: str
    values: tuple[float, ...]
    bounds: tuple[float, float]
    baseline: float | None
    config: Callable[[float], Overrides]
    title: Callable[[float], str]


def _easiest(fraction: float) -> Overrides:
    if fraction == 1:
        return {"data": {"selection": {"class_path": "sppo_lightning.selection.All"}}}
    rule = {"class_path": "sppo_lightning.selection.Easiest", "init_args": {"fraction": fraction}}
    return {"data": {"selection": rule}}


SWEEPS = {
    "fraction": Parameter(
        question="Which fraction of the prompts, the easiest ones, is best to train on?",
        values=(0.1, 0.3, 0.5, 1.0),
        bounds=(0.0, 1.0),
        baseline=1.0,
        config=_easiest,
        title=lambda fraction: "all prompts" if fraction == 1 else f"easiest {100 * fraction:g} %",
    )
}


def sweep_study(
    path: Path, sweep: str, *, values: str | None = None, seeds: str | None = None, output: str | None = None
) -> Study:
    """Return the study of a sweep.

    Args:
        path: config of ``fit``, with held-out prompts.
        sweep: name of the parameter.
        values: of it, separated by commas; in any order.
        seeds: of each value, separated by commas.
        output: folder; default: ``runs/studies/<sweep>-<name of the config>``.

    Raises:
        UserError: if there is nothing to choose, or nothing to choose by.
    """
    if sweep not in SWEEPS:
        raise UserError(f"--sweep {sweep}: there is no such sweep; give {', '.join(SWEEPS)}")
    parameter = SWEEPS[sweep]
    chosen_from = parameter.values if values is None else _values(values, parameter.bounds)
    wanted = SEEDS if seeds is None else _seeds(seeds)
    data = read_settings(path, "--config").get("data")
    if not isinstance(data, dict) or not data.get("eval_prompts"):
        raise UserError(
            f"--config {path}: has no data.eval_prompts, and a sweep chooses by held-out prompts: name a file of them"
        )
    limits = [
        "It is chosen from the values that were tried, for this policy, reward and number of iterations."
    ]
    if data.get("steps_per_iteration") is None:
        limits.append(
            "A value that leaves more pairs takes more optimizer steps, as fit does with this config: what it gains "
            "may come from the steps. To compare at equal steps, set data.steps_per_iteration in the config."
        )
    return Study(
        name=f"{sweep}-{path.stem}",
        question=parameter.question,
        config=[path.name],
        arms={
            arm_of(sweep, value): Arm(title=parameter.title(value), config=parameter.config(value))
            for value in sorted(chosen_from)
        },
        seeds=list(wanted),
        settings={"values": {}},
        matched="nothing" if data.get("steps_per_iteration") is None else "steps",
        limits=limits,
        output=output,
    )


def arm_of(sweep: str, value: float) -> str:
    """Return the name of a value's arm."""
    return f"{sweep}-{value}"


def baseline_of(study: Study, sweep: str) -> str | None:
    """Return the arm that the choice is compared with; ``None``: it is not among the values."""
    value = SWEEPS[sweep].baseline
    arm = None if value is None else arm_of(sweep, value)
    return arm if arm in study.arms else None


def _values(text: str, bounds: tuple[float, float]) -> list[float]:
    low, high = bounds
    found = _numbers("--values", text, float, "0.1,0.3,1.0")
    for value in found:
        if not (low < value <= high and math.isfinite(value)):
            raise UserError(f"--values {text}: {value} lies outside ({low:g}, {high:g}]")
    if len(found) < 2:
        raise UserError(f"--values {text}: one value leaves nothing to choose: give at least two")
    return found


def _seeds(text: str) -> list[int]:
    found = _numbers("--seeds", text, int, "1,2,3")
    for seed in found:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {text}: {seed} must be a number from 0 to {2**32 - 1}")
    return found


def _numbers(option: str, text: str, kind: Callable[[str], Any], example: str) -> list[Any]:
    found: list[Any] = []
    for part in text.split(","):
        try:
            number = kind(part.strip())
        except ValueError:
            raise UserError(
                f"{option} {text}: {part.strip()!r} is no such number: give some, separated by commas, e.g. {example}"
            ) from None
        if number in found:
            raise UserError(f"{option} {text}: {number} is there twice: leave one out")
        found.append(number)
    return found
