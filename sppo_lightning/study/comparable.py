"""Which runs of a study were measured alike, so that their gains can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sppo_lightning.study.outcomes import Numbers, Outcome

NEAR = 0.01  # of the initial rewards' standard deviation: rounding of a served reward
MOST_DIFFERING = 0.1  # of the held-out prompts: near-ties of a server's greedy answers


@dataclass(frozen=True)
class Comparable:
    """The runs that can be compared, and the others.

    Args:
        kept: in order.
        left_out: by a run's name, why it was left out.
        notes: on differences that were let pass.
    """

    kept: tuple[Outcome, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]


def comparable(outcomes: Sequence[Outcome]) -> Comparable:
    """Compare what runs of one setting measured of their initial policy, which is the same for all.

    A run is left out if it was measured on other held-out prompts than the run that most agree with, or if more than a
    tenth of them have another initial reward there. Served models do not repeat a greedy answer or a reward to the bit:
    fewer differences are let pass and noted.
    """
    left_out: dict[str, str] = {}
    notes = []
    for setting in dict.fromkeys(item.run.setting for item in outcomes):
        here = [item for item in outcomes if item.run.setting == setting]
        typical = max(here, key=lambda item: sum(_differing(other, item) is not None for other in here))
        differing = []
        for item in here:
            count = _differing(item, typical)
            if item.prompt_ids != typical.prompt_ids:
                left_out[item.run.name] = f"was measured on other held-out prompts than {typical.run.name}"
            elif count is None:
                left_out[item.run.name] = (
                    f"gives the initial policy's answers other rewards than {typical.run.name} does"
                )
            elif count:
                differing.append(count)
        if differing:
            notes.append(
                f"{setting}: the initial policy's held-out answers did not get the same rewards in all runs: in "
                f"{len(differing)} of {len(here)}, up to {max(differing)} of {len(typical.prompt_ids)} prompts differ "
                f"from {typical.run.name} by more than {NEAR:.0%} of the rewards' standard deviation. A gain is taken "
                "within its run."
            )
    kept = tuple(item for item in outcomes if item.run.name not in left_out)
    return Comparable(kept, left_out, tuple(notes))


def _differing(ours: Outcome, theirs: Outcome) -> int | None:
    """Return how many prompts have another initial reward, or ``None`` if they are too many or other prompts."""
    if ours.prompt_ids != theirs.prompt_ids:
        return None
    first, second = ours.evaluations[0].rewards, theirs.evaluations[0].rewards
    count = len(first) - int(_near(first, second).sum())
    return count if count <= MOST_DIFFERING * len(first) else None


def _near(first: Numbers, second: Numbers) -> NDArray[np.bool_]:
    """[P]: equal but for rounding; no reward equals no reward."""
    known = second[np.isfinite(second)]
    near = NEAR * float(known.std()) if known.size else 0.0
    return np.isclose(first, second, rtol=0.0, atol=near, equal_nan=True)
