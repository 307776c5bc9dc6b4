"""Schedules that learn a few numbers from each probe: the value of a category, a target. Shapes: P prompts.

Without ``DifficultyReestimation`` a prompt is probed once in a run, and there is little to learn.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import random_keys
from sppo_lightning.selection.contract import Schedule
from sppo_lightning.selection.schedules import in_order
from sppo_lightning.selection.shares import Fraction, checked_fraction, fraction_at, rounded
from sppo_lightning.types import UserError


class CategoryBandit(Schedule):
    """Draws more prompts of the categories that the policy learns most from (SEC, arXiv 2505.14970).

    Categories are the arms of a bandit: each place goes to category c with probability ``softmax(Q(c) / τ)``, and to a
    random prompt of it, without replacement. After the probe, ``Q(c) ← Q(c) + α (R(c) - Q(c))``, R(c) the mean of
    ``|A|`` over the responses to the category's prompts, ``A = r - mean r`` of the same prompt. Q begins at 0. The
    source updates once a step, from the advantages of its RL algorithm.

    Args:
        fraction: share of the prompts, in (0, 1], or one for each iteration.
        temperature: τ, in reward units.
        learning_rate: α, in (0, 1].
        column: key of the prompt file that names a prompt's category.
    """

    requires = ("responses",)

    def __init__(
        self,
        fraction: Fraction,
        temperature: float = 1.0,
        learning_rate: float = 0.5,
        column: str = "category",
    ) -> None:
        self.fraction = checked_fraction(self, "fraction", fraction)
        if not 0 < temperature < math.inf:
            raise ValueError(f"CategoryBandit.temperature={temperature} must be positive and finite")
        if not 0 < learning_rate <= 1:
            raise ValueError(f"CategoryBandit.learning_rate={learning_rate} must lie in (0, 1]")
        self.temperature = temperature
        self.learning_rate = learning_rate
        self.column = column
        self.prompt_fields = (column,)
        self._categories: dict[str, str] = {}  # by prompt
        self._values: dict[str, float] = {}  # Q, by category

    def setup(self, prompts: StatisticsTable) -> None:
        """Note each prompt's category."""
        categories = map(str, prompts.metadata(self.column))
        self._categories = dict(zip(prompts.prompt_ids, categories, strict=True))

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return a weighted draw without replacement: the highest log-weights plus Gumbel noise."""
        categories = [self._categories[prompt_id] for prompt_id in prompt_ids]
        sizes = Counter(categories)
        log_weights = {
            category: self._values.get(category, 0.0) / self.temperature - math.log(size)
            for category, size in sizes.items()
        }
        keys = random_keys(prompt_ids, seed, iteration, "bandit")
        noise = -(-keys.log()).log()
        score = torch.tensor([log_weights[category] for category in categories], dtype=torch.float64) + noise
        keep = rounded(fraction_at(self.fraction, iteration), len(prompt_ids))
        order = score.argsort(descending=True, stable=True).tolist()
        return in_order(prompt_ids, {prompt_ids[row] for row in order[:keep]})

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Move the value of each category that was probed."""
        responses = table.responses
        counts = responses.starts.diff()
        sums = torch.zeros(len(table), dtype=torch.float64).index_add_(0, responses.rows, responses.rewards)
        means = sums / counts.clamp(min=1)
        advantages = (responses.rewards - means[responses.rows]).abs()
        totals = torch.zeros(len(table), dtype=torch.float64).index_add_(0, responses.rows, advantages)
        sizes: Counter[str] = Counter()
        gains: defaultdict[str, float] = defaultdict(float)
        for prompt_id, total, count in zip(table.prompt_ids, totals.tolist(), counts.tolist(), strict=True):
            if count >= 2:
                category = self._categories[prompt_id]
                sizes[category] += count
                gains[category] += total
        for category, size in sizes.items():
            value = self._values.get(category, 0.0)
            self._values[category] = value + self.learning_rate * (gains[category] / size - value)

    def metrics(self) -> dict[str, float]:
        """Return the value of each category."""
        return {f"value/{category}": value for category, value in sorted(self._values.items())}

    def state_dict(self) -> dict[str, Any]:
        """Return the value of each category."""
        return {"values": dict(sorted(self._values.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the values."""
        self._values = dict(state["values"])


class AdaptiveTarget(Schedule):
    """Prompts nearest to a target difficulty that follows the policy (AdaRFT, arXiv 2504.05520).

    After the probe, ``T ← clip(T + η tanh(α (R̄ - β)), lowest d, highest d)``, R̄ the mean reward of the prompts that
    were probed. d is a score from the prompt file, high = difficult: unlike the mean reward, it stays where it is when
    the policy moves. The source updates once a step.

    Args:
        fraction: share of the prompts, in (0, 1], or one for each iteration.
        start: T of the first iteration, in units of d.
        step: η, in units of d.
        target_reward: β, in reward units.
        sensitivity: α, per unit of reward.
        column: key of the prompt file with d, a number.
    """

    requires = ("mean_reward", "estimated_iteration")

    def __init__(
        self,
        fraction: Fraction,
        start: float,
        step: float,
        target_reward: float,
        sensitivity: float = 2.0,
        column: str = "difficulty",
    ) -> None:
        self.fraction = checked_fraction(self, "fraction", fraction)
        for name, value in {"start": start, "target_reward": target_reward}.items():
            if not math.isfinite(value):
                raise ValueError(f"AdaptiveTarget.{name}={value} must be finite")
        for name, value in {"step": step, "sensitivity": sensitivity}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"AdaptiveTarget.{name}={value} must be positive and finite")
        self.start = start
        self.step = step
        self.target_reward = target_reward
        self.sensitivity = sensitivity
        self.column = column
        self.prompt_fields = (column,)
        self._target = start
        self._scores: dict[str, float] = {}  # d, by prompt

    def setup(self, prompts: StatisticsTable) -> None:
        """Note each prompt's score.

        Raises:
            UserError: if one is no finite number.
        """
        self._scores = {}
        for prompt_id, value in zip(prompts.prompt_ids, prompts.metadata(self.column), strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise UserError(
                    f"data.schedule AdaptiveTarget needs a number under {self.column!r} of each prompt, but prompt "
                    f"{prompt_id!r} in data.prompts has {value!r}: correct the file, or name another key as `column`"
                )
            self._scores[prompt_id] = float(value)

    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the share of ``prompt_ids`` with the least ``|d - T|``, ties by random key."""
        scores = torch.tensor([self._scores[prompt_id] for prompt_id in prompt_ids], dtype=torch.float64)
        by_key = random_keys(prompt_ids, seed, iteration, "target").argsort(stable=True)
        order = by_key[(scores - self._target).abs()[by_key].argsort(stable=True)].tolist()
        keep = rounded(fraction_at(self.fraction, iteration), len(prompt_ids))
        return in_order(prompt_ids, {prompt_ids[row] for row in order[:keep]})

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Move the target."""
        rewards = table["mean_reward"][table["estimated_iteration"] == iteration]
        if len(rewards):
            change = self.step * math.tanh(self.sensitivity * (float(rewards.mean()) - self.target_reward))
            lowest, highest = min(self._scores.values()), max(self._scores.values())
            self._target = min(max(self._target + change, lowest), highest)

    def metrics(self) -> dict[str, float]:
        """Return the next iteration's target."""
        return {"target": self._target}

    def state_dict(self) -> dict[str, Any]:
        """Return the target."""
        return {"target": self._target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the target."""
        self._target = float(state["target"])
