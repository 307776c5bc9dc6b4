"""A reward that charges for length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sppo_lightning.rewards.protocol import Reward, Scores, checked_scores
from sppo_lightning.rewards.wrapped import WrappedReward
from sppo_lightning.types import Prompt


class LengthPenalty(WrappedReward):
    """Takes ``per_character * max(0, characters - free)`` off another reward.

    Both are logged apart, as ``reward`` and ``length_penalty``.

    Args:
        reward: what is charged.
        per_character: taken off for each character, in units of that reward; greater than 0.
        free: characters of a response that cost nothing.
    """

    def __init__(self, reward: Reward, per_character: float, free: int = 0) -> None:
        if not 0 < per_character < math.inf:
            raise ValueError(f"LengthPenalty.per_character={per_character} must be a number greater than 0")
        if free < 0:
            raise ValueError(f"LengthPenalty.free={free} must be 0 characters or more")
        super().__init__(reward)
        self.per_character = per_character
        self.free = free

    def around(self, reward: Reward) -> Reward:
        """Charge another reward as much."""
        return LengthPenalty(reward, self.per_character, self.free)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Score with the charged reward, and take the penalty off."""
        found = checked_scores(self.reward, prompts, responses)
        penalties = [self.per_character * max(0, len(response) - self.free) for response in responses]
        return Scores(
            [reward - penalty for reward, penalty in zip(found.rewards, penalties, strict=True)],
            found.reasons,
            {
                "reward": found.rewards,
                "length_penalty": penalties,
                **{f"reward/{part}": values for part, values in found.parts.items()},
            },
            found.error,
        )
