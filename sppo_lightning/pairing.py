"""From a prompt's scored responses to a chosen and a rejected one. Shapes: N responses of one prompt."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable, reward_statistics
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import EncodedPrompt, PreferencePair, Rollout

PAIR_COLUMNS = (
    "difficulty",
    "mean_reward",
    "std_reward",
    "min_reward",
    "max_reward",
    "samples",
    "gap",
    "chosen_reward",
    "rejected_reward",
    "chosen_length",
    "rejected_length",
    "reference_chosen_logp",
    "reference_rejected_logp",
)
"""Columns of the table that ``data.pair_selection`` sees; lengths in tokens, log-probs in nats."""


class Choice(NamedTuple):
    """Row numbers of the chosen and the rejected response."""

    chosen: int
    rejected: int


class Pairing(ABC):
    """Chooses the two responses to learn from, by ``class_path`` in the config."""

    @abstractmethod
    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return the pair.

        Args:
            rewards: ``[N]`` finite rewards, not all equal, in the order of ``sample_index``.
            generator: the prompt's own randomness.
        """


class BestWorst(Pairing):
    """Highest against lowest reward, as in the paper; ties go to the lowest ``sample_index``."""

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax, argmin)."""
        return Choice(int(rewards.argmax()), int(rewards.argmin()))


class BestRandom(Pairing):
    """Highest reward against a random response with a lower one (Online-RLHF's max/random)."""

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax, a random row below the maximum)."""
        lower = (rewards < rewards.max()).nonzero().flatten()
        pick = int(torch.randint(len(lower), (1,), generator=generator))
        return Choice(int(rewards.argmax()), int(lower[pick]))


class PairingResult(NamedTuple):
    """The pairs, and the prompts that gave none, by reason."""

    pairs: list[PreferencePair]
    dropped: Counter[str]


def build_pairs(
    rollouts: Mapping[str, Sequence[Rollout]],
    prompts: Mapping[str, EncodedPrompt],
    pairing: Pairing,
    *,
    samples_per_prompt: int,
    iteration: int,
    seed: int,
) -> PairingResult:
    """Pair each prompt's first ``samples_per_prompt`` responses.

    A prompt is dropped as ``non_finite_reward`` (fewer than two finite rewards), ``tied_rewards`` (all
    equal), or ``identical_responses`` (chosen and rejected are the same tokens or read the same).

    Args:
        rollouts: scored responses by prompt id.
        prompts: encoded prompts by id.
        pairing: the rule.
        samples_per_prompt: responses that take part; the lowest ``sample_index`` values are used.
        iteration: self-play iteration, for the rule's randomness.
        seed: the run's seed.
    """
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    for prompt_id, rows in rollouts.items():
        taken = sorted(rows, key=lambda row: row.sample_index)[:samples_per_prompt]
        scored = [row for row in taken if row.reward is not None and math.isfinite(row.reward)]
        if len(scored) < 2:
            dropped["non_finite_reward"] += 1
            continue
        rewards = torch.tensor([row.reward for row in scored], dtype=torch.float64)
        if bool(rewards.max() == rewards.min()):
            identical = len({row.response for row in scored}) == 1
            dropped["identical_responses" if identical else "tied_rewards"] += 1
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, iteration, prompt_id, "pairing"))
        choice = pairing.choose(rewards, generator)
        chosen, rejected = scored[choice.chosen], scored[choice.rejected]
        if chosen.token_ids == rejected.token_ids or chosen.response == rejected.response:
            dropped["identical_responses"] += 1
            continue
        assert chosen.reward is not None
        assert rejected.reward is not None
        pairs.append(
            PreferencePair(
                prompt_id=prompt_id,
                prompt_token_ids=prompts[prompt_id].token_ids,
                chosen_token_ids=chosen.token_ids,
                rejected_token_ids=rejected.token_ids,
                chosen=chosen.response,
                rejected=rejected.response,
                chosen_reward=chosen.reward,
                rejected_reward=rejected.reward,
            )
        )
    return PairingResult(pairs, dropped)


def pair_statistics(
    pairs: Sequence[PreferencePair],
    rewards: Mapping[str, Sequence[float]],
    difficulty: Mapping[str, float],
) -> StatisticsTable:
    """Return the :data:`PAIR_COLUMNS` of each pair.

    Args:
        pairs: pairs with their reference log-probs.
        rewards: finite rewards by prompt id.
        difficulty: difficulty by prompt id.
    """
    statistics = reward_statistics({pair.prompt_id: rewards[pair.prompt_id] for pair in pairs})

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return StatisticsTable(
        statistics.prompt_ids,
        {
            **statistics.columns,
            "difficulty": column([difficulty[pair.prompt_id] for pair in pairs]),
            "gap": column([pair.chosen_reward - pair.rejected_reward for pair in pairs]),
            "chosen_reward": column([pair.chosen_reward for pair in pairs]),
            "rejected_reward": column([pair.rejected_reward for pair in pairs]),
            "chosen_length": column([len(pair.chosen_token_ids) for pair in pairs]),
            "rejected_length": column([len(pair.rejected_token_ids) for pair in pairs]),
            "reference_chosen_logp": column([pair.reference_chosen_logp for pair in pairs]),
            "reference_rejected_logp": column([pair.reference_rejected_logp for pair in pairs]),
        },
    )
