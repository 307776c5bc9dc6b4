"""From a prompt's scored responses to a chosen and a rejected one. Shapes: N responses of one prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable, reward_statistics
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import EncodedPrompt, PreferencePair, ScoredRollout

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


class Outcome(NamedTuple):
    """A prompt's pair, or why it has none."""

    pair: PreferencePair | None
    drop_reason: str | None


def pair_responses(
    rows: Sequence[ScoredRollout],
    prompt: EncodedPrompt,
    pairing: Pairing,
    *,
    samples_per_prompt: int,
    iteration: int,
    seed: int,
) -> Outcome:
    """Pair the first ``samples_per_prompt`` responses to a prompt.

    Without two usable responses the prompt is dropped for the reason that most of the others have (most often
    ``non_finite_reward``); else as ``tied_rewards`` (all equal) or ``identical_responses`` (chosen and rejected are
    the same tokens or read the same).

    Args:
        rows: scored responses; those with the lowest ``sample_index`` take part.
        prompt: what they answer.
        pairing: the rule.
        samples_per_prompt: responses that take part.
        iteration: self-play iteration, for the rule's randomness.
        seed: the run's seed.
    """
    taken = sorted(rows, key=lambda row: row.sample_index)[:samples_per_prompt]
    scored = [row for row in taken if row.usable]
    if len(scored) < 2:
        return Outcome(None, main_drop_reason(taken))
    rewards = torch.tensor([row.reward for row in scored], dtype=torch.float64)
    if bool(rewards.max() == rewards.min()):
        identical = len({row.response for row in scored}) == 1
        return Outcome(None, "identical_responses" if identical else "tied_rewards")
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, prompt.prompt.id, "pairing"))
    choice = pairing.choose(rewards, generator)
    chosen, rejected = scored[choice.chosen], scored[choice.rejected]
    if chosen.token_ids == rejected.token_ids or chosen.response == rejected.response:
        return Outcome(None, "identical_responses")
    assert chosen.reward is not None
    assert rejected.reward is not None
    pair = PreferencePair(
        prompt_id=prompt.prompt.id,
        prompt_token_ids=prompt.token_ids,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        chosen=chosen.response,
        rejected=rejected.response,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
    )
    return Outcome(pair, None)


def main_drop_reason(rows: Sequence[ScoredRollout]) -> str:
    """Return the reason that most of a prompt's unusable responses have."""
    reasons = Counter(row.drop_reason or "non_finite_reward" for row in rows if not row.usable)
    return reasons.most_common(1)[0][0] if reasons else "non_finite_reward"


def pair_statistics(
    prompt_ids: Sequence[str],
    pairs: Mapping[str, Tensor],
    rewards: Mapping[str, Sequence[float]],
    difficulty: Mapping[str, float],
) -> StatisticsTable:
    """Return the :data:`PAIR_COLUMNS` of each pair.

    Args:
        prompt_ids: of the pairs.
        pairs: rewards, lengths and reference log-probs of chosen and rejected responses, ``[pairs]`` each.
        rewards: usable rewards by prompt id.
        difficulty: difficulty by prompt id.
    """
    statistics = reward_statistics({prompt_id: rewards[prompt_id] for prompt_id in prompt_ids})
    columns = {
        **statistics.columns,
        **pairs,
        "difficulty": torch.tensor([difficulty[key] for key in prompt_ids], dtype=torch.float64),
        "gap": pairs["chosen_reward"] - pairs["rejected_reward"],
    }
    return StatisticsTable(statistics.prompt_ids, {name: columns[name] for name in PAIR_COLUMNS})
