"""Rules that keep a share of the rows: they differ in how they rank them. Shapes: P prompts, or pairs."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import distinct, random_keys
from sppo_lightning.selection.contract import Selection

Fraction = float | list[float]
"""A share in (0, 1], or one for each iteration (the last one repeats)."""


def checked_fraction(owner: object, name: str, fraction: Fraction) -> list[float]:
    """Return the share of each iteration.

    Raises:
        ValueError: if one lies outside (0, 1].
    """
    values = fraction if isinstance(fraction, list) else [fraction]
    if not values or not all(0 < value <= 1 for value in values):
        raise ValueError(f"{type(owner).__name__}.{name}={fraction} must lie in (0, 1]")
    return values


def fraction_at(values: list[float], iteration: int) -> float:
    """Return the share of an iteration; the last one repeats."""
    return values[min(iteration, len(values) - 1)]


def rounded(fraction: float, total: int) -> int:
    """Round half up, with a guard against 0.3 * 10 = 2.9999…"""
    return int(fraction * total + 0.5 + 1e-9)


def ascending(score: Tensor, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
    """Return row numbers ``[P]`` by ascending score, ties by random key."""
    keys = random_keys(distinct(table.prompt_ids), seed, iteration, "tie")
    by_key = keys.argsort(stable=True)
    return by_key[score[by_key].argsort(stable=True)]


def mask_of(rows: Tensor, total: int) -> Tensor:
    """Return a bool mask ``[total]``, true in ``rows``."""
    mask = torch.zeros(total, dtype=torch.bool)
    mask[rows] = True
    return mask


class Share(Selection):
    """Keeps the share of the rows that comes first.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = checked_fraction(self, "fraction", fraction)

    @abstractmethod
    def ranked(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return row numbers ``[P]``, those to keep first."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the first rows, as many as :meth:`size` says."""
        keep = self.size(len(table), iteration=iteration)
        return mask_of(self.ranked(table, iteration=iteration, seed=seed)[:keep], len(table))

    def size(self, total: int, *, iteration: int) -> int:
        """Return the rounded share of ``total``."""
        return rounded(fraction_at(self.fraction, iteration), total)


class HighestShare(Share):
    """Keeps the share of the rows with the highest score; a subclass says what the score is.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    @abstractmethod
    def score(self, table: StatisticsTable) -> Tensor:
        """Return ``[P]`` float64; NaN where there is none, which ranks last."""

    def ranked(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return row numbers by descending score, ties by random key."""
        score = self.score(table)
        score = score.where(~score.isnan(), -math.inf)
        return ascending(score, table, iteration=iteration, seed=seed).flip(0)


class LowestShare(Share):
    """Keeps the share of the rows with the lowest score; a subclass says what the score is.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    @abstractmethod
    def score(self, table: StatisticsTable) -> Tensor:
        """Return ``[P]`` float64; NaN where there is none, which ranks last."""

    def ranked(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return row numbers by ascending score, ties by random key."""
        score = self.score(table)
        score = score.where(~score.isnan(), math.inf)
        return ascending(score, table, iteration=iteration, seed=seed)


class RandomFraction(Share):
    """A random share: the size-matched control without which no claim about another rule stands.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    def ranked(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return row numbers by ascending random key."""
        return random_keys(distinct(table.prompt_ids), seed, iteration, "random").argsort(stable=True)
