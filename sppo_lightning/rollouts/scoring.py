"""Rewards onto rollouts: a response that cannot be used leaves under a named reason, and never stops a run alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from sppo_lightning.rewards import Reward
from sppo_lightning.rewards.protocol import CheckedScores, checked_scores
from sppo_lightning.types import WIN_PROBABILITY, Prompt, Rollout, UserError

FEW = 64  # responses that are too few to judge a share by, in a phase with more to come
CHOSEN = "unfinished"  # the one reason that a config asks for; all others are failures


@dataclass(frozen=True)
class UnfinishedRule:
    """What becomes of a response that its length limit cut.

    Args:
        rule: ``keep`` it as it is, ``drop`` it, or ``penalise`` it.
        penalty: taken off its reward; with ``penalise`` only.
    """

    rule: Literal["keep", "drop", "penalise"] = "keep"
    penalty: float | None = None

    def __post_init__(self) -> None:
        if (self.rule == "penalise") != (self.penalty is not None):
            raise ValueError(
                f"data.unfinished={self.rule} with data.unfinished_penalty={self.penalty}: a penalty goes with "
                "penalise, and only with it"
            )
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise ValueError(f"data.unfinished_penalty={self.penalty} must be greater than 0")

    def apply(self, row: Rollout) -> Rollout:
        """Return a scored response with the rule applied."""
        if self.rule == "keep" or row.drop_reason is not None:
            return row
        cut = row.finish_reason == "length"
        if self.penalty is None:
            return replace(row, drop_reason=CHOSEN) if cut else row
        assert row.reward is not None
        penalty = self.penalty if cut else 0.0
        parts = {**row.reward_parts, "unfinished_penalty": penalty}
        return replace(row, reward=row.reward - penalty, reward_parts=parts)


class ScoredRows(NamedTuple):
    """Responses with their rewards."""

    rows: list[Rollout]
    error: str | None  # what the first failed call of the reward said


def score_rows(
    reward: Reward,
    rows: Sequence[Rollout],
    prompts: Mapping[str, Prompt],
    *,
    opponents: Mapping[str, str] | None = None,
) -> ScoredRows:
    """Score responses; each has a reward after, which is NaN where there is none.

    Args:
        reward: the scorer.
        rows: responses, those to one prompt side by side.
        prompts: by id.
        opponents: by prompt id, what a comparative reward compares a response with, itself where there is none;
            ``None``: the prompt's other responses.
    """
    answered = [number for number, row in enumerate(rows) if row.drop_reason is None]
    asked = [prompts[rows[number].prompt_id] for number in answered]
    said = [rows[number].response for number in answered]
    if not answered:
        scores = CheckedScores([], {}, {}, None)
    elif opponents is None or not reward.comparative:
        scores = checked_scores(reward, asked, said)
    else:
        doubled = [prompt for prompt in asked for _ in range(2)]
        against = [
            text
            for prompt, own in zip(asked, said, strict=True)
            for text in (own, opponents.get(prompt.id, own))
        ]
        scores = _every_second(checked_scores(reward, doubled, against))
    parts = {**_win_probabilities(reward, scores), **scores.parts}
    found = [replace(row, reward=math.nan) for row in rows]
    for position, number in enumerate(answered):
        found[number] = replace(
            rows[number],
            reward=scores.rewards[position],
            reward_parts={name: values[position] for name, values in parts.items()},
            drop_reason=scores.reasons.get(position),
        )
    return ScoredRows(found, scores.error)


def _win_probabilities(reward: Reward, scores: CheckedScores) -> dict[str, list[float]]:
    if not reward.gives_win_probabilities:
        return {}
    found = scores.parts.get(WIN_PROBABILITY, scores.rewards)
    wrong = [value for value in found if not (math.isnan(value) or 0 <= value <= 1)]
    if wrong:
        raise UserError(
            f"data.reward {type(reward).__name__} gave {wrong[0]!r} as a win probability: one lies in [0, 1]; set "
            "gives_win_probabilities to false if its rewards are none"
        )
    return {WIN_PROBABILITY: found}


def _every_second(scores: CheckedScores) -> CheckedScores:
    return CheckedScores(
        scores.rewards[::2],
        {row // 2: reason for row, reason in scores.reasons.items() if row % 2 == 0},
        {name: values[::2] for name, values in scores.parts.items()},
        scores.error,
    )


class FailureWatch:
    """Raises once too many of a phase's responses are of no use, or none at all is of any use.

    Args:
        share: largest share of the phase that may fail, in [0, 1].
        total: responses of the phase.
    """

    def __init__(self, share: float, total: int) -> None:
        self.share = share
        self.total = total
        self._seen = 0
        self._reasons: Counter[str] = Counter()
        self._error: str | None = None

    def remember(self, responses: int, reasons: Sequence[str]) -> None:
        """Count responses that were scored before, of which some were dropped."""
        self._seen += responses
        self._reasons.update(reasons)

    def add(self, scored: ScoredRows) -> None:
        """Count some responses.

        Raises:
            UserError: with the reasons and the first error, if too many failed already, whatever the others do, or if
                all did so far.
        """
        self.remember(
            len(scored.rows), [row.drop_reason for row in scored.rows if row.drop_reason is not None]
        )
        self._error = self._error or scored.error
        failed = self._reasons.total() - self._reasons[CHOSEN]
        nothing_works = self.share < 1 and failed == self._seen >= min(FEW, self.total)
        if failed > self.share * self.total or nothing_works:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
            first = f"; the first error: {self._error}" if self._error else ""
            raise UserError(
                f"{failed} of {self._seen} responses are of no use ({reasons}), over data.max_failed_share="
                f"{self.share:g}{first}: correct the cause, or allow a larger share"
            )
