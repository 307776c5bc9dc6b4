"""Schedules that remember single prompts: how difficult they were, how often they were tied. Shapes: P prompts.

Without ``DifficultyReestimation`` a prompt is probed once in a run, and there is little to remember.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import random_keys
from sppo_lightning.selection.contract import Schedule
from sppo_lightning.selection.schedules import in_order
from sppo_lightning.selection.shares import rounded


def middle_ranks(values: Tensor) -> Tensor:
    """Return ``(rows below + half of the rows equal) / P``, ``[P]`` in (0, 1): rows that tie have one rank."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to) / (2 * len(values))


class DifficultyPools(Schedule):
    """Takes hard, normal and easy prompts with different probabilities, as prime-rl's pools do.

    A prompt's pool comes from the rank of its last known mean reward among all known ones: hard up to the quantile
    ``hard``, normal up to ``easy``, easy above. A prompt is a candidate with the probability of its pool; one that is
    not known yet is normal. prime-rl sets its borders in reward units, for rewards from 0 to 1. If no prompt is left,
    all are candidates.

    Args:
        hard: quantile up to which a prompt is hard, in [0, 1].
        easy: quantile above which a prompt is easy, in [0, 1], at least ``hard``.
        hard_weight: probability of a hard prompt, in [0, 1].
        normal_weight: probability of a normal prompt, in [0, 1].
        easy_weight: probability of an easy prompt, in [0, 1].
    """

    requires = ("difficulty",)

    def __init__(
        self,
        hard: float = 0.25,
        easy: float = 0.75,
        hard_weight: float = 0.2,
        normal_weight: float = 1.0,
        easy_weight: float = 0.2,
    ) -> None:
        if not 0 <= hard <= easy <= 1:
            raise ValueError(f"DifficultyPools(hard={hard}, easy={easy}) must satisfy 0 <= hard <= easy <= 1")
        weights = {"hard_weight": hard_weight, "normal_weight": normal_weight, "easy_weight": easy_weight}
        for name, weight in weights.items():
            if not 0 <= weight <= 1:
                raise ValueError(f"DifficultyPools.{name}={weight} must lie in [0, 1]: it is a probability")
        self.hard = hard
        self.easy = easy
        self.hard_weight = hard_weight
        self.normal_weight = normal_weight
        self.easy_weight = easy_weight
        self._hard: set[str] = set()
        self._easy: set[str] = set()

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the prompts whose random key lies below the probability of their pool."""
        keys = random_keys(prompt_ids, seed, iteration, "pool").tolist()
        drawn = [
            prompt_id
            for prompt_id, key in zip(prompt_ids, keys, strict=True)
            if key < self._weight(prompt_id)
        ]
        return drawn or list(prompt_ids)

    def _weight(self, prompt_id: str) -> float:
        if prompt_id in self._hard:
            return self.hard_weight
        return self.easy_weight if prompt_id in self._easy else self.normal_weight

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Sort all known prompts into the pools."""
        ranks = middle_ranks(table["difficulty"]).tolist()
        named = list(zip(table.prompt_ids, ranks, strict=True))
        self._hard = {prompt_id for prompt_id, rank in named if rank <= self.hard}
        self._easy = {prompt_id for prompt_id, rank in named if rank > self.easy}

    def metrics(self) -> dict[str, float]:
        """Return the sizes of the outer pools."""
        return {"hard": float(len(self._hard)), "easy": float(len(self._easy))}

    def state_dict(self) -> dict[str, Any]:
        """Return the prompts of the outer pools."""
        return {"hard": sorted(self._hard), "easy": sorted(self._easy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the pools."""
        self._hard, self._easy = set(state["hard"]), set(state["easy"])


class SkipTied(Schedule):
    """Skips prompts whose last probes gave no preference, to save their responses (GRESO, arXiv 2506.02177).

    A prompt whose last z probes in a row were each tied, all rewards equal, is skipped with probability ``1 - p^z``.
    The source adapts p while it trains, apart for prompts whose responses are all right or all wrong; here p is fixed.
    A probe of one usable response tells nothing.

    Args:
        explore: p, in [0, 1): the probability to sample a prompt that was tied once.
        least: share of the prompts, in (0, 1], below which skipping does not go: those that were tied least often stay.
    """

    requires = ("min_reward", "max_reward", "samples", "estimated_iteration")

    def __init__(self, explore: float = 0.5, least: float = 0.5) -> None:
        if not 0 <= explore < 1:
            raise ValueError(f"SkipTied.explore={explore} must lie in [0, 1)")
        if not 0 < least <= 1:
            raise ValueError(f"SkipTied.least={least} must lie in (0, 1]")
        self.explore = explore
        self.least = least
        self._times: dict[str, int] = {}  # tied probes in a row

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the prompts that are not skipped."""
        tied = [prompt_id for prompt_id in prompt_ids if prompt_id in self._times]
        keys = dict(zip(tied, random_keys(tied, seed, iteration, "tied").tolist(), strict=True))
        skipped = [
            prompt_id for prompt_id in tied if keys[prompt_id] >= self.explore ** self._times[prompt_id]
        ]
        skipped.sort(key=lambda prompt_id: (-self._times[prompt_id], -keys[prompt_id]))
        most = len(prompt_ids) - max(1, rounded(self.least, len(prompt_ids)))
        return in_order(prompt_ids, set(prompt_ids).difference(skipped[: max(0, most)]))

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Count on for the prompts that are tied again, and forget those that are not."""
        told = (table["estimated_iteration"] == iteration) & (table["samples"] >= 2)
        tied = table["max_reward"] == table["min_reward"]
        for row in told.nonzero().flatten().tolist():
            prompt_id = table.prompt_ids[row]
            if tied[row]:
                self._times[prompt_id] = self._times.get(prompt_id, 0) + 1
            else:
                self._times.pop(prompt_id, None)

    def metrics(self) -> dict[str, float]:
        """Return how many prompts are tied."""
        return {"tied": float(len(self._times))}

    def state_dict(self) -> dict[str, Any]:
        """Return the tied probes in a row, by prompt."""
        return {"times": dict(sorted(self._times.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counts."""
        self._times = dict(state["times"])
