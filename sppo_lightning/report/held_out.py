"""What was measured on the held-out prompts after each iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sppo_lightning.evaluation.gate import failed_share
from sppo_lightning.evaluation.length_controlled import has_scikit_learn, length_controlled_win_rate
from sppo_lightning.evaluation.measures import measure, paired_difference
from sppo_lightning.evaluation.win_rate import reward_preferences
from sppo_lightning.report.estimates import INTERVAL, Estimate
from sppo_lightning.report.run_data import Evaluation, RunData
from sppo_lightning.types import Rollout, UserError

REFITS = 100  # of the length-controlled win rate's interval, each a few milliseconds


class Measure(NamedTuple):
    """How a measure is shown."""

    title: str
    unit: str  # of its values; ``share``: shown in percent
    about: str


MEASURES: Mapping[str, Measure] = {
    "reward": Measure("Reward", "reward", "Mean reward of the greedy answers."),
    "gain": Measure("Gain", "reward", "Reward less the initial policy's, prompt by prompt."),
    "win_rate": Measure(
        "Win rate", "share", "Answers with a higher reward than the initial policy's; ties count half."
    ),
    "length_controlled_win_rate": Measure(
        "Length-controlled win rate",
        "share",
        "What the win rate would be at equal lengths: AlpacaEval 2's model without difficulties (minimal).",
    ),
    "kl": Measure(
        "KL",
        "nat per token",
        "From the initial policy: how much less likely its answers to the first held-out prompts have become.",
    ),
    "length": Measure("Length", "tokens", "Mean tokens of an answer, its end token included."),
}
"""By name, in the order in which they are shown; a measure that no run has is left out."""


class HeldOutPoint(NamedTuple):
    """An evaluation in numbers."""

    finished: int
    measures: Mapping[str, Estimate]  # names are those of MEASURES
    failed: float  # share of answers without a finite reward
    unfinished: float  # share of answers cut by the length limit


def held_out_points(run: RunData) -> list[HeldOutPoint]:
    """Return what each evaluation of a run measured; what cannot be measured is noted."""
    initial = next((one.rows for one in run.evaluations if one.finished == 0), None)
    divergences = {one.number + 1: one.diagnostics.get("val/kl/initial", math.nan) for one in run.iterations}
    points = []
    for one in run.evaluations:
        measures = _measures(one, initial)
        if measures is None:
            run.reader.note(
                run.reader.folder.evaluation(f"{one.finished:03d}"), "no answer has a finite reward."
            )
            measures = {}
        kl = Estimate.of(one.divergences.values())
        if not math.isfinite(kl.mean):  # runs of older versions have the mean alone
            kl = Estimate(divergences.get(one.finished, math.nan), math.nan, 1)
        if math.isfinite(kl.mean):
            measures["kl"] = kl
        answered = [row for row in one.rows if row.finish_reason != "failed"]
        cut = sum(row.finish_reason == "length" for row in answered)
        points.append(
            HeldOutPoint(
                one.finished,
                measures,
                failed=failed_share(one.rows),
                unfinished=cut / len(answered) if answered else math.nan,
            )
        )
    return points


def _measures(evaluation: Evaluation, initial: Sequence[Rollout] | None) -> dict[str, Estimate] | None:
    """Return the measures of an evaluation; ``None`` if no answer has a finite reward."""
    try:
        batch = measure(evaluation.rows, initial)
    except UserError:
        return None
    found = {"reward": Estimate.of(batch.reward), "length": Estimate.of(batch.length)}
    if initial is not None and evaluation.finished > 0:
        found["gain"] = Estimate.of_difference(paired_difference(evaluation.rows, initial))
        found["win_rate"] = Estimate.of(batch.win)
        if has_scikit_learn() and math.isfinite(
            (controlled := length_controlled(evaluation.rows, initial)).mean
        ):
            found["length_controlled_win_rate"] = controlled
    return found


def length_controlled(rows: Sequence[Rollout], initial: Sequence[Rollout]) -> Estimate:
    """Return the length-controlled win rate; half of its bootstrap interval stands for the standard errors.

    NaN with fewer answers than its cross-validation has folds.
    """
    before = {row.prompt_id: row for row in initial}
    pairs = [(row, before[row.prompt_id]) for row in rows if row.prompt_id in before]
    preferences = reward_preferences([now.reward for now, _ in pairs], [then.reward for _, then in pairs])
    found = length_controlled_win_rate(
        preferences,
        [len(now.response) for now, _ in pairs],
        [len(then.response) for _, then in pairs],
        seed=0,
        resamples=REFITS,
    )
    known = sum(map(math.isfinite, preferences))
    return Estimate(found.rate, (found.high - found.low) / 2 / INTERVAL, known)
