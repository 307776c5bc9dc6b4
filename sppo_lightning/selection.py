"""Which prompts an iteration sees, which of them it trains on, and in what order.

Three kinds of rule, each chosen in the config by ``class_path``:

- schedule: the candidate prompts of an iteration, before anything is sampled;
- selection: the prompts (or pairs) to keep, from a table of statistics;
- curriculum: the order of the pairs inside an iteration.

Every rule is deterministic and permutation-equivariant: ties and random choices are settled by a key derived
from (seed, iteration, prompt id), and from a number where a prompt has several pairs. Shapes: P prompts, or pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import distinct, random_keys

Fraction = float | list[float]
"""A share of the prompts in (0, 1], or one for each iteration (the last one repeats)."""


def _checked(owner: str, name: str, fraction: Fraction) -> list[float]:
    values = fraction if isinstance(fraction, list) else [fraction]
    if not values or not all(0 < value <= 1 for value in values):
        raise ValueError(f"{owner}.{name}={fraction} must lie in (0, 1]")
    return values


def _at(values: list[float], iteration: int) -> float:
    return values[min(iteration, len(values) - 1)]


def _count(fraction: float, total: int) -> int:
    """Round half up, with a guard against 0.3 * 10 = 2.9999…"""
    return int(fraction * total + 0.5 + 1e-9)


class Rule:
    """What a rule may keep from one iteration to the next: what it knows goes into checkpoints and manifests.

    A run that is resumed, or makes an iteration's data again, gives a rule the state that it had before.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule knows, in JSON types: text keys, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, in this process or in an earlier one."""


# ---------------------------------------------------------------- schedules


class Schedule(Rule, ABC):
    """Chooses an iteration's candidate prompts.

    Before a run it is asked about all iterations, to see whether they have prompts enough.
    """

    @abstractmethod
    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the candidates among ``prompt_ids``, in the order of ``prompt_ids``."""


class AllPrompts(Schedule):
    """Every prompt in every iteration."""

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return all of ``prompt_ids``."""
        return list(prompt_ids)


class DisjointSplits(Schedule):
    """A fresh part of the prompts in each iteration: a random partition into ``data.iterations`` parts.

    SPPO (arXiv 2405.00675) trains its three iterations on three such splits.
    """

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return part ``iteration`` of ``iterations``; sizes differ by one at most."""
        order = random_keys(prompt_ids, seed, "split").argsort(stable=True).tolist()
        part = {prompt_ids[row] for row in order[iteration % iterations :: iterations]}
        return [prompt_id for prompt_id in prompt_ids if prompt_id in part]


class RandomSubset(Schedule):
    """A random share of the prompts, drawn anew in each iteration.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = _checked("RandomSubset", "fraction", fraction)

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the share of ``prompt_ids`` with the lowest random keys."""
        keep = _count(_at(self.fraction, iteration), len(prompt_ids))
        order = random_keys(prompt_ids, seed, iteration, "subset").argsort(stable=True).tolist()
        part = {prompt_ids[row] for row in order[:keep]}
        return [prompt_id for prompt_id in prompt_ids if prompt_id in part]


# --------------------------------------------------------------- selections


class Selection(Rule, ABC):
    """Chooses prompts, or pairs, from a table of statistics.

    ``requires`` names the columns that the rule reads, and ``responses`` or ``history`` if it asks for them; a slot
    that lacks one refuses the rule at start.
    """

    requires: tuple[str, ...] = ()

    @abstractmethod
    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return a bool mask ``[P]``, true where a row is kept.

        Args:
            table: ``data.selection`` gets :data:`~sppo_lightning.difficulty.DIFFICULTY_COLUMNS`, and
                ``table.responses`` and ``table.history`` when it asks for them; ``data.pair_selection`` gets
                :data:`~sppo_lightning.pairing.PAIR_COLUMNS`, a row a pair.
            iteration: self-play iteration, from 0.
            seed: the run's seed.
        """

    def size(self, total: int, *, iteration: int) -> int | None:
        """Return how many of ``total`` rows the rule keeps, or ``None`` if it depends on the values."""
        return None


class AllPairs(Selection):
    """Every pair; the default of ``data.pair_selection``."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return an all-true mask."""
        return torch.ones(len(table), dtype=torch.bool)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total``."""
        return total


class All(Selection):
    """Every candidate prompt."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return an all-true mask."""
        return torch.ones(len(table), dtype=torch.bool)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total``."""
        return total


def _hardest_first(table: StatisticsTable, iteration: int, seed: int) -> Tensor:
    """Return row numbers by ascending mean reward, ties by random key."""
    keys = random_keys(distinct(table.prompt_ids), seed, iteration, "tie")
    by_key = keys.argsort(stable=True)
    return by_key[table["difficulty"][by_key].argsort(stable=True)]


def _rank_mask(order: Tensor, start: int, stop: int) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[start:stop]] = True
    return mask


class Easiest(Selection):
    """The easiest share of the prompts: the paper's rule, with fraction 0.3 (arXiv 2510.05534).

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = _checked("Easiest", "fraction", fraction)

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows with the highest mean reward."""
        total = len(table)
        keep = self.size(total, iteration=iteration)
        return _rank_mask(_hardest_first(table, iteration, seed), total - keep, total)

    def size(self, total: int, *, iteration: int) -> int:
        """Return the rounded share of ``total``."""
        return _count(_at(self.fraction, iteration), total)


class DropHardest(Selection):
    """All but the hardest share of the prompts: the rule of the paper's earlier version.

    Args:
        fraction: share to drop in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = _checked("DropHardest", "fraction", fraction)

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return all but the rows with the lowest mean reward."""
        total = len(table)
        start = total - self.size(total, iteration=iteration)
        return _rank_mask(_hardest_first(table, iteration, seed), start, total)

    def size(self, total: int, *, iteration: int) -> int:
        """Return ``total`` less the rounded share."""
        return total - _count(_at(self.fraction, iteration), total)


class Hardest(Selection):
    """The hardest share of the prompts: the paper's negative control.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    requires = ("difficulty",)

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = _checked("Hardest", "fraction", fraction)

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows with the lowest mean reward."""
        keep = self.size(len(table), iteration=iteration)
        return _rank_mask(_hardest_first(table, iteration, seed), 0, keep)

    def size(self, total: int, *, iteration: int) -> int:
        """Return the rounded share of ``total``."""
        return _count(_at(self.fraction, iteration), total)


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
        start, stop = _count(self.low, len(table)), _count(self.high, len(table))
        return _rank_mask(_hardest_first(table, iteration, seed), start, stop)

    def size(self, total: int, *, iteration: int) -> int:
        """Return the number of ranks in the band."""
        return _count(self.high, total) - _count(self.low, total)


class RandomFraction(Selection):
    """A random share: the size-matched control without which no claim about another rule stands.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = _checked("RandomFraction", "fraction", fraction)

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows with the lowest random keys."""
        keep = self.size(len(table), iteration=iteration)
        order = random_keys(distinct(table.prompt_ids), seed, iteration, "random").argsort(stable=True)
        return _rank_mask(order, 0, keep)

    def size(self, total: int, *, iteration: int) -> int:
        """Return the rounded share of ``total``."""
        return _count(_at(self.fraction, iteration), total)


# ---------------------------------------------------------------- curricula


class Curriculum(Rule, ABC):
    """Orders the pairs inside an iteration; it is asked for all epochs in turn, before the first one."""

    @abstractmethod
    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return row numbers ``[P]`` in training order.

        Args:
            difficulty: ``[P]`` mean reward of each pair's prompt; low = difficult.
            keys: ``[P]`` random keys of (seed, epoch, prompt id, number of the prompt's pair), for shuffling and ties.
        """


class RandomOrder(Curriculum):
    """A fresh random order in each epoch."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by ascending key."""
        return keys.argsort(stable=True)


class EasyToHard(Curriculum):
    """Easiest prompts first."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by descending mean reward, ties by key."""
        by_key = keys.argsort(stable=True)
        return by_key[difficulty[by_key].argsort(descending=True, stable=True)]


class HardToEasy(Curriculum):
    """Most difficult prompts first."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by ascending mean reward, ties by key."""
        by_key = keys.argsort(stable=True)
        return by_key[difficulty[by_key].argsort(stable=True)]
