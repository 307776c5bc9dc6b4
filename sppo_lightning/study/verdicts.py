"""What the claims of a study came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sppo_lightning.study.definition import INITIAL, Study
from sppo_lightning.study.outcomes import Numbers, Outcome
from sppo_lightning.study.statistics import LEVEL, Comparison, compare, holm

Reading = Literal["steps", "tokens"]


@dataclass(frozen=True)
class Verdict:
    """A claim in one setting.

    Args:
        claim: its name.
        setting: where it was tested.
        reading: ``steps``: the policies that the runs ended with; ``tokens``: both arms once they had sampled as many
            tokens as the one that sampled fewer.
        comparison: of the claim's arm with the other one.
        p: corrected for all claims and settings of the reading (Holm), those included that cannot be read yet.
        seeds: that the comparison will have once all runs have ended.
    """

    claim: str
    setting: str
    reading: Reading
    comparison: Comparison
    p: float
    seeds: int

    @property
    def word(self) -> str:
        """``supported``, ``contradicted`` or ``undecided``; or why there is no verdict.

        None is given before all seeds have ended: to look until a claim comes true is no test.
        """
        if self.comparison.seeds < self.seeds:
            return "not complete"
        if math.isnan(self.p):
            return "one seed" if self.comparison.seeds == 1 else "not measured"
        if self.p >= 1 - LEVEL:
            return "undecided"
        return "supported" if self.comparison.mean > 0 else "contradicted"


def verdicts(study: Study, outcomes: Sequence[Outcome], reading: Reading) -> list[Verdict]:
    """Return a verdict for each claim and setting whose runs have ended.

    Args:
        study: that names the claims.
        outcomes: of the runs that have ended.
        reading: at equal steps, or at equal tokens.
    """
    by_run = {(item.run.setting, item.run.arm, item.run.seed): item for item in outcomes}
    found = {}
    for name, claim in study.claims.items():
        for setting in study.settings_of(claim):
            pairs = _pairs(by_run, setting, claim.arm, claim.against)
            if pairs:
                differences = np.stack([_difference(ours, other, reading) for ours, other in pairs])
                found[name, setting] = compare(differences, tests=study.tests)
    p_values = {f"{name}\0{setting}": each.p for (name, setting), each in found.items()}
    corrected = holm(p_values, tests=study.tests)
    return [
        Verdict(
            name,
            setting,
            reading,
            each,
            corrected[f"{name}\0{setting}"],
            len(study.seeds_of_claim(study.claims[name])),
        )
        for (name, setting), each in found.items()
    ]


def _pairs(
    by_run: Mapping[tuple[str, str, int], Outcome], setting: str, arm: str, against: str
) -> list[tuple[Outcome, Outcome | None]]:
    """Return the outcomes of an arm with those of another that has the same seed."""
    found: list[tuple[Outcome, Outcome | None]] = []
    for (place, name, seed), ours in by_run.items():
        if (place, name) == (setting, arm):
            other = by_run.get((setting, against, seed))
            if against == INITIAL or other is not None:
                found.append((ours, other))
    return found


def _difference(ours: Outcome, other: Outcome | None, reading: Reading) -> Numbers:
    """[P]: how much more an arm gained than another, or, for ``None``, than nothing."""
    if other is None:  # at any number of tokens it is the initial policy
        return ours.gain
    if reading == "steps":
        return ours.gain - other.gain
    budget = min(ours.tokens, other.tokens)
    return ours.gain_at(budget) - other.gain_at(budget)
