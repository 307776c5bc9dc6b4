"""Rules for ``data.pair_selection``.

Shapes: P pairs. y_w is the chosen, y_l the rejected response, r a reward, |y| a length in tokens, π_ref the reference:
with ``model.reference: previous_iteration`` the policy at the iteration's start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection.contract import Selection
from sppo_lightning.selection.shares import HighestShare, LowestShare

_LOGPS = ("reference_chosen_logp", "chosen_length", "reference_rejected_logp", "rejected_length")


class AllPairs(Selection):
    """Every pair; the default of ``data.pair_selection``."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return an all-true mask."""
        return torch.ones(len(table), dtype=torch.bool)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total``."""
        return total


# ------------------------------------------------------------------------- RIP


def rejecting(table: StatisticsTable, *, reward: float, length: float, gap: float) -> Tensor:
    """Return ``r(y_l) >= τ₁ and |y_l| >= τ₂ and r(y_w) - r(y_l) <= τ₃``, ``[P]`` bool (RIP, arXiv 2501.18578).

    Args:
        table: of pairs.
        reward: τ₁, in reward units.
        length: τ₂, tokens.
        gap: τ₃, in reward units.
    """
    return (table["rejected_reward"] >= reward) & (table["rejected_length"] >= length) & (table["gap"] <= gap)


class RIP(Selection):
    """Rejecting Instruction Preferences, by quantiles of the iteration's pairs (arXiv 2501.18578).

    Keeps a pair whose rejected response has a high reward and is long, and whose gap is small, as low-quality prompts
    give bad and widely varying responses. The source measures best-against-worst pairs once, before training; here it
    is each iteration's own pairs. How many pairs it keeps depends on their values.

    Args:
        reward_quantile: of the rejected rewards, in [0, 1]; pairs from there on are kept. 0: any.
        length_quantile: of the rejected lengths, in [0, 1]; pairs from there on are kept. 0: any.
        gap_quantile: of the gaps, in [0, 1]; pairs up to there are kept. 1: any.
    """

    requires = ("rejected_reward", "rejected_length", "gap")

    def __init__(self, reward_quantile: float, length_quantile: float, gap_quantile: float) -> None:
        quantiles = {
            "reward_quantile": reward_quantile,
            "length_quantile": length_quantile,
            "gap_quantile": gap_quantile,
        }
        for name, value in quantiles.items():
            if not 0 <= value <= 1:
                raise ValueError(f"RIP.{name}={value} must lie in [0, 1]")
        self.reward_quantile = reward_quantile
        self.length_quantile = length_quantile
        self.gap_quantile = gap_quantile

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows that pass all three quantiles."""
        if not len(table):
            return torch.zeros(0, dtype=torch.bool)
        return rejecting(
            table,
            reward=float(table["rejected_reward"].quantile(self.reward_quantile)),
            length=float(table["rejected_length"].quantile(self.length_quantile)),
            gap=float(table["gap"].quantile(self.gap_quantile)),
        )


class RIPThresholds(Selection):
    """Rejecting Instruction Preferences, by fixed thresholds (arXiv 2501.18578); see :class:`RIP`.

    Args:
        min_rejected_reward: in reward units.
        min_rejected_length: tokens.
        max_gap: in reward units.
    """

    requires = ("rejected_reward", "rejected_length", "gap")

    def __init__(self, min_rejected_reward: float, min_rejected_length: int, max_gap: float) -> None:
        if not max_gap > 0:
            raise ValueError(f"RIPThresholds.max_gap={max_gap} must be positive")
        self.min_rejected_reward = min_rejected_reward
        self.min_rejected_length = min_rejected_length
        self.max_gap = max_gap

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows that pass all three thresholds."""
        return rejecting(
            table, reward=self.min_rejected_reward, length=self.min_rejected_length, gap=self.max_gap
        )


# --------------------------------------------------------- by the policy's own log-probs


def logp_margin(table: StatisticsTable) -> Tensor:
    """Return ``log π_ref(y_w) / |y_w| - log π_ref(y_l) / |y_l|``, ``[P]``, nats a token."""
    chosen = table["reference_chosen_logp"] / table["chosen_length"]
    return chosen - table["reference_rejected_logp"] / table["rejected_length"]


class SmallestLogpMargin(LowestShare):
    """The share of the pairs with the smallest log-prob margin of chosen over rejected; negative is smaller still.

    ``log π_ref(y_w) / |y_w| - log π_ref(y_l) / |y_l|`` is the implicit reward margin of SimPO (arXiv 2405.14734), less
    its β. arXiv 2508.04149 keeps the tenth of the pairs with the smallest implicit reward gap of DPO,
    ``β log π(y_w) / π_ref(y_w) - β log π(y_l) / π_ref(y_l)``, of a model that was trained before. That gap is 0 for
    every pair at the start of an iteration whose reference is the policy, so that it cannot be had here.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = _LOGPS

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the margin, in nats a token."""
        return logp_margin(table)


class LargestLogpMargin(HighestShare):
    """The share of the pairs with the largest log-prob margin; see :class:`SmallestLogpMargin`.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = _LOGPS

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the margin, in nats a token."""
        return logp_margin(table)


def log_perplexity(table: StatisticsTable) -> Tensor:
    """Return the log-perplexity of the chosen response, ``-log π_ref(y_w) / |y_w|``, ``[P]``, nats a token."""
    return -table["reference_chosen_logp"] / table["chosen_length"]


class LowestPerplexity(LowestShare):
    """The share of the pairs whose chosen response has the lowest perplexity, ``exp(-log π_ref(y_w) / |y_w|)``.

    A baseline of arXiv 2501.18578.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("reference_chosen_logp", "chosen_length")

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the log-perplexity of the chosen response, which ranks as the perplexity does."""
        return log_perplexity(table)


class HighestPerplexity(HighestShare):
    """The share of the pairs whose chosen response has the highest perplexity; see :class:`LowestPerplexity`.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("reference_chosen_logp", "chosen_length")

    def score(self, table: StatisticsTable) -> Tensor:
        """Return the log-perplexity of the chosen response, which ranks as the perplexity does."""
        return log_perplexity(table)
