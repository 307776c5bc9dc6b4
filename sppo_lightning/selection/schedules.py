"""Schedules that look at nothing but the iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import random_keys
from sppo_lightning.selection.contract import Schedule
from sppo_lightning.selection.shares import Fraction, checked_fraction, fraction_at, rounded


def in_order(prompt_ids: Sequence[str], chosen: set[str]) -> list[str]:
    """Return those of ``prompt_ids`` that are chosen, in their order."""
    return [prompt_id for prompt_id in prompt_ids if prompt_id in chosen]


def random_subset(prompt_ids: Sequence[str], keep: int, *, iteration: int, seed: int) -> list[str]:
    """Return the ``keep`` prompts with the lowest random keys of the iteration, in the order of ``prompt_ids``."""
    order = random_keys(prompt_ids, seed, iteration, "subset").argsort(stable=True).tolist()
    return in_order(prompt_ids, {prompt_ids[row] for row in order[:keep]})


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
        return in_order(prompt_ids, {prompt_ids[row] for row in order[iteration % iterations :: iterations]})


class RandomSubset(Schedule):
    """A random share of the prompts, drawn anew in each iteration.

    Args:
        fraction: share in (0, 1], or one for each iteration.
    """

    def __init__(self, fraction: Fraction) -> None:
        self.fraction = checked_fraction(self, "fraction", fraction)

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the share of ``prompt_ids`` with the lowest random keys."""
        keep = rounded(fraction_at(self.fraction, iteration), len(prompt_ids))
        return random_subset(prompt_ids, keep, iteration=iteration, seed=seed)


class MatchedRandomSubset(Schedule):
    """As many random prompts as another schedule names: that schedule's size-matched control.

    The other schedule observes the random prompts.

    Args:
        schedule: asked for the size.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.requires = schedule.requires
        self.prompt_fields = schedule.prompt_fields

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the prompts with the lowest random keys."""
        others = self.schedule.candidates(prompt_ids, iteration=iteration, iterations=iterations, seed=seed)
        return random_subset(prompt_ids, len(others), iteration=iteration, seed=seed)

    def setup(self, prompts: StatisticsTable) -> None:
        """Hand on the prompts."""
        self.schedule.setup(prompts)

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Hand on the table."""
        self.schedule.observe(table, iteration=iteration)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the other schedule."""
        return self.schedule.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the other schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand on the state."""
        self.schedule.load_state_dict(state)
