"""Win probabilities made of a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sppo_lightning.rewards.protocol import Reward, Scores, checked_scores
from sppo_lightning.rewards.wrapped import WrappedReward
from sppo_lightning.types import WIN_PROBABILITY, Prompt


class WinProbabilityReward(WrappedReward):
    """Adds to another reward how likely each response beats the prompt's other ones, for losses that read it.

    The rewards stay as they are. The part ``win_probability`` of a response is the mean, over the prompt's other
    responses that have a reward, of ``sigmoid((reward - other reward) / scale)``: the probabilities of a
    Bradley-Terry model, where SPPO (arXiv 2405.00675) asks a judge. The other reward's own parts stand under
    ``reward/<part>``.

    Args:
        reward: what the probabilities are made of.
        scale: the gap of rewards at which the better response wins by 73 %, in units of that reward; greater than 0.
            1 for a reward model that was trained on a Bradley-Terry loss.
    """

    gives_win_probabilities = True
    comparative = True

    def __init__(self, reward: Reward, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"WinProbabilityReward.scale={scale} must be a number greater than 0")
        super().__init__(reward)
        self.scale = scale

    @property
    def gives_difficulty(self) -> bool:
        """Whether the other reward gives one: its numbers stay."""
        return self.reward.gives_difficulty

    def around(self, reward: Reward) -> Reward:
        """Make the same of another reward."""
        return WinProbabilityReward(reward, self.scale)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Score with the other reward, and compare the rewards of each prompt."""
        found = checked_scores(self.reward, prompts, responses)
        rows_of: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if math.isfinite(found.rewards[row]):
                rows_of.setdefault(prompt.id, []).append(row)
        probabilities = [math.nan] * len(responses)
        for rows in rows_of.values():
            for row in rows:
                wins = [
                    self._wins(found.rewards[row] - found.rewards[other]) for other in rows if other != row
                ]
                # exact summation, so that the order of the responses changes no probability
                probabilities[row] = math.fsum(wins) / len(wins) if wins else math.nan
        parts = {f"reward/{part}": values for part, values in found.parts.items()}
        return Scores(found.rewards, found.reasons, {WIN_PROBABILITY: probabilities, **parts}, found.error)

    def _wins(self, gap: float) -> float:
        """Return the probability that the response with the higher reward by ``gap`` wins."""
        return (1 + math.tanh(gap / (2 * self.scale))) / 2
