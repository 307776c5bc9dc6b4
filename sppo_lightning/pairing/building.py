"""From a prompt's scored responses to pairs of a chosen and a rejected one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable, reward_statistics
from sppo_lightning.pairing.contract import Choice, Pairing, Responses, win_probability
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import EncodedPrompt, PreferencePair, ScoredRollout, UserError

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
    "chosen_win_probability",
    "rejected_win_probability",
)
"""Columns of the table that ``data.pair_selection`` sees; lengths in tokens, log-probs in nats.

Win probabilities are NaN where ``data.reward`` gives none.
"""


class Outcome(NamedTuple):
    """What becomes of a prompt."""

    pairs: list[PreferencePair]
    drop_reason: str | None  # why the prompt has no pair
    dropped_choices: Counter[str]  # choices of the rule that became no pair, by reason


def pair_responses(
    rows: Sequence[ScoredRollout],
    prompt: EncodedPrompt,
    pairing: Pairing,
    *,
    samples_per_prompt: int,
    iteration: int,
    seed: int,
) -> Outcome:
    """Pair the first ``samples_per_prompt`` usable responses to a prompt.

    Without two usable responses the prompt is dropped for the reason that most of the others have (most often
    ``non_finite_reward``); if all rewards are equal, as ``tied_rewards`` or ``identical_responses``; if the rule
    chooses nothing, as ``no_pair``. A choice is dropped as ``identical_responses`` (chosen and rejected are the same
    tokens or read the same), ``tied_rewards``, or ``repeated_pair`` (the same tokens as an earlier choice); a prompt
    without any other choice is dropped for the reason that most of them have.

    Args:
        rows: scored responses; of the usable ones those with the lowest ``sample_index`` take part.
        prompt: what they answer.
        pairing: the rule.
        samples_per_prompt: responses that take part.
        iteration: self-play iteration, for the rule's randomness.
        seed: the run's seed.

    Raises:
        UserError: if the rule chooses a response that is not there, or more pairs than its ``most_pairs``.
    """
    usable = sorted((row for row in rows if row.usable), key=lambda row: row.sample_index)
    scored = usable[:samples_per_prompt]
    if len(scored) < 2:
        return Outcome([], main_drop_reason(rows), Counter())
    rewards = torch.tensor([row.reward for row in scored], dtype=torch.float64)
    if bool(rewards.max() == rewards.min()):
        identical = len({row.response for row in scored}) == 1
        return Outcome([], "identical_responses" if identical else "tied_rewards", Counter())
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, prompt.prompt.id, "pairing"))
    choices = pairing.pairs(Responses(scored, rewards), generator)
    _check_choices(choices, len(scored), pairing, prompt.prompt.id)
    pairs: dict[tuple[tuple[int, ...], tuple[int, ...]], PreferencePair] = {}
    dropped: Counter[str] = Counter()
    for choice in choices:
        chosen, rejected = scored[choice[0]], scored[choice[1]]
        tokens = chosen.token_ids, rejected.token_ids
        if tokens[0] == tokens[1] or chosen.response == rejected.response:
            dropped["identical_responses"] += 1
        elif chosen.reward == rejected.reward:
            dropped["tied_rewards"] += 1
        elif tokens in pairs:
            dropped["repeated_pair"] += 1
        else:
            pairs[tokens] = _pair(prompt, chosen, rejected)
    if pairs:
        return Outcome(list(pairs.values()), None, dropped)
    return Outcome([], dropped.most_common(1)[0][0] if dropped else "no_pair", dropped)


def _check_choices(choices: Sequence[Choice], responses: int, pairing: Pairing, prompt_id: str) -> None:
    name = f"data.pairing {type(pairing).__name__}"
    if not isinstance(choices, Sequence) or not all(isinstance(c, tuple) and len(c) == 2 for c in choices):
        raise UserError(f"{name} returned {choices!r}: it must return a list of Choice(chosen, rejected)")
    if len(choices) > pairing.most_pairs:
        raise UserError(
            f"{name} chose {len(choices)} pairs of prompt {prompt_id!r}, more than its "
            f"most_pairs={pairing.most_pairs}: set most_pairs to the most that it may choose"
        )
    for row in (row for choice in choices for row in choice):
        if not -responses <= row < responses:
            raise UserError(
                f"{name} chose response {row} of the {responses} usable ones to prompt {prompt_id!r}: it must choose "
                f"from 0 to {responses - 1}"
            )


def _pair(prompt: EncodedPrompt, chosen: ScoredRollout, rejected: ScoredRollout) -> PreferencePair:
    assert chosen.reward is not None
    assert rejected.reward is not None
    return PreferencePair(
        prompt_id=prompt.prompt.id,
        prompt_token_ids=prompt.token_ids,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        chosen=chosen.response,
        rejected=rejected.response,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_win_probability=win_probability(chosen),
        rejected_win_probability=win_probability(rejected),
        chosen_sample_index=chosen.sample_index,
        rejected_sample_index=rejected.sample_index,
    )


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
        prompt_ids: of the pairs, once a pair.
        pairs: rewards, lengths and reference log-probs of chosen and rejected responses, ``[pairs]`` each.
        rewards: usable rewards by prompt id.
        difficulty: difficulty by prompt id.
    """
    by_prompt = reward_statistics({prompt_id: rewards[prompt_id] for prompt_id in prompt_ids})
    statistics = by_prompt.rows(prompt_ids)
    columns = {
        **statistics.columns,
        **pairs,
        "difficulty": torch.tensor([difficulty[key] for key in prompt_ids], dtype=torch.float64),
        "gap": pairs["chosen_reward"] - pairs["rejected_reward"],
    }
    return StatisticsTable(statistics.prompt_ids, {name: columns[name] for name in PAIR_COLUMNS})
