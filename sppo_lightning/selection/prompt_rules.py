"""Rules for ``data.selection``; those that read only columns of both tables serve ``data.pair_selection`` too.

Shapes: P prompts, R responses. r is a reward, D a prompt's mean reward (its difficulty, low = difficult).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection.contract import Selection
from sppo_lightning.selection.shares import (
    Fraction,
    HighestShare,
    LowestShare,
    ascending,
    checked_fraction,
    fraction_at,
    mask_of,
    rounded,
)

PAIRS_AT_ONCE = 2**22  # response pairs whose preferences are held at a time
DECIMALS = 12
"""Of a preference variance. The last bits of a sigmoid depend on a row's place, and would settle ties by it."""


class All(Selection):
    """Every candidate prompt."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return an all-true mask."""
        return torch.ones(len(table), dtype=torch.bool)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total``."""
        return total


# ------------------------------------------------------------- by mean reward


class Easiest(HighestShare):
    """The easiest share of the prompts, by D: the paper's rule, with fraction 0.3 (arXiv 2510.05534).

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the mean reward."""
        return table["difficulty"]


class Hardest(LowestShare):
    """The hardest share of the prompts, by D: the paper's negative control (arXiv 2510.05534).

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the mean reward."""
        return table["difficulty"]


class DropHardest(Selection):
    """All but the hardest share of the prompts: the rule of the paper's earlier version.

    Args:
        fraction: share to drop in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = checked_fraction(self, "fraction", fraction)

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return all but the rows with the lowest mean reward."""
        order = ascending(table["difficulty"], table, iteration=iteration, seed=seed)
        total = len(table)
        return mask_of(order[total - self.size(total, iteration=iteration) :], total)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total`` less the rounded share."""
        return total - rounded(fraction_at(self.fraction, iteration), total)


class Band(Selection):
    """A quantile band of the mean reward; ``low=0, high=0.25`` is the hardest quartile.

    Args:
        low: lower quantile, in [0, 1).
        high: upper quantile, in (0, 1], above ``low``.
    """

    requires = ("difficulty",)

    def __init__(self, low: float, high: float) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"Band(low={low}, high={high}) must satisfy 0 <= low < high <= 1")
        self.low = low
        self.high = high

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows whose rank by mean reward lies in the band."""
        order = ascending(table["difficulty"], table, iteration=iteration, seed=seed)
        return mask_of(order[rounded(self.low, len(table)) : rounded(self.high, len(table))], len(table))

    def size(self, total: int, *, iteration: int) -> int:
        """Return the number of ranks in the band."""
        return rounded(self.high, total) - rounded(self.low, total)


class RewardBand(Selection):
    """Prompts whose mean reward lies near a target: ``|D - target| <= width``.

    With a reward of 0 or 1, target ½ and width w it is the balanced online filter ``½ - w <= p <= ½ + w`` of arXiv
    2504.03380. How many prompts it keeps depends on their rewards.

    Args:
        target: mean reward, in reward units.
        width: largest distance from it, in reward units.
    """

    requires = ("difficulty",)

    def __init__(self, target: float, width: float) -> None:
        if not math.isfinite(target):
            raise ValueError(f"RewardBand.target={target} must be finite")
        if not 0 <= width < math.inf:
            raise ValueError(f"RewardBand.width={width} must be at least 0 and finite")
        self.target = target
        self.width = width

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows whose mean reward lies in the band, its ends included."""
        return (table["difficulty"] - self.target).abs() <= self.width


# ----------------------------------------------------------- by spread of rewards


class HighestRewardStd(HighestShare):
    """The share of the prompts with the largest standard deviation of their rewards (arXiv 2604.06268).

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("std_reward",)

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the population's standard deviation of a prompt's rewards."""
        return table["std_reward"]


class HighestRewardGap(HighestShare):
    """The share of the prompts with the largest gap ``max r - min r``.

    The reward variance of arXiv 2604.06268, with the range in place of the deviation.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("max_reward", "min_reward")

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the highest less the lowest reward of a prompt."""
        return table["max_reward"] - table["min_reward"]


def preference_variance(rewards: Tensor) -> Tensor:
    """Return the variance of ``σ(r_i - r_j)`` over the ordered pairs of different responses (arXiv 2510.13022).

    Their mean is ½, as each pair comes in both orders.

    Args:
        rewards: ``[P, n]``, n ≥ 2.

    Returns:
        ``[P]``, from 0 to ¼.
    """
    n = rewards.shape[1]
    preferences = (rewards[:, :, None] - rewards[:, None, :]).sigmoid()
    return (preferences - 0.5).square().sum((1, 2)) / (n * (n - 1))  # a response and itself: ½


class HighestPVar(HighestShare):
    """The share of the prompts with the largest preference variance (arXiv 2510.13022, with fraction 0.1).

    ``PVar = Var over i ≠ j of σ(r_i - r_j)``, from the rewards of this iteration's probe. The source takes it from a
    reward model too. A prompt without two usable responses in the probe ranks last.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("responses",)

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the preference variance; NaN for prompts without two responses."""
        responses = table.responses
        counts = responses.starts.diff()
        score = torch.full((len(table),), math.nan, dtype=torch.float64)
        for n in sorted(set(counts.tolist())):
            if n < 2:
                continue
            for rows in (counts == n).nonzero().flatten().split(max(1, PAIRS_AT_ONCE // n**2)):
                places = responses.starts[rows][:, None] + torch.arange(n)
                score[rows] = preference_variance(responses.rewards[places])
        return score.round(decimals=DECIMALS)


class HighestLearnability(HighestShare):
    """The share of the prompts with the largest learnability ``p(1 - p)`` (arXiv 2502.12272).

    p is the share of the probe's rewards in this iteration that reach a threshold: the source's success rate. A prompt
    without a usable response in the probe ranks last.

    Args:
        fraction: share in (0, 1], or one for each iteration.
        threshold: reward from which on a response counts as a success.
    """

    requires = ("responses",)

    def __init__(self, fraction: Fraction, threshold: float) -> None:
        super().__init__(fraction)
        if not math.isfinite(threshold):
            raise ValueError(f"HighestLearnability.threshold={threshold} must be finite")
        self.threshold = threshold

    def score(self, table: StatisticsTable) -> Tensor:
        """Return p(1 - p); NaN for prompts without responses."""
        responses = table.responses
        successes = torch.zeros(len(table), dtype=torch.float64)
        successes.index_add_(0, responses.rows, (responses.rewards >= self.threshold).double())
        share = successes / responses.starts.diff()
        return share * (1 - share)
