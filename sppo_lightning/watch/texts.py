"""A run's prompts and responses, read when somebody looks at them."""

from __future__ import annotations

import math
from typing import NamedTuple

from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder


class PromptRow(NamedTuple):
    """A prompt of an iteration."""

    prompt_id: str
    text: str | None  # what the user says; ``None``: it was deleted with the responses
    difficulty: float  # mean reward; nan: not known yet
    selected: bool
    rewards: list[float]  # of its usable responses


class ResponseRow(NamedTuple):
    """A response."""

    mark: str  # chosen, rejected or why it was dropped; empty: none of these
    reward: float | None
    tokens: int
    finish_reason: str
    text: str


class HeldOutRow(NamedTuple):
    """A held-out prompt."""

    prompt_id: str
    text: str
    before: float | None  # reward of the initial policy's answer
    after: float | None  # of the last policy's


def prompts_of(folder: RunFolder, iteration: int) -> list[PromptRow]:
    """Return the prompts of an iteration, the most difficult first.

    Args:
        folder: the run.
        iteration: that has begun.

    Raises:
        UserError: if they cannot be read.
    """
    store = folder.iteration(iteration)
    rewards = {} if store.pruned else store.shards.rewards()
    texts = {} if store.pruned else store.shards.prompt_texts()
    difficulties: dict[str, float] = {}
    selected: set[str] = set()
    if store.difficulty_path.exists():
        table, selected = store.read_difficulty()
        difficulties = dict(zip(table.prompt_ids, table["difficulty"].tolist(), strict=True))
    rows = [
        PromptRow(
            prompt_id,
            texts.get(prompt_id),
            difficulties.get(prompt_id, math.nan),
            prompt_id in selected,
            list(rewards.get(prompt_id, ())),
        )
        for prompt_id in dict.fromkeys([*difficulties, *texts])
    ]
    return sorted(rows, key=lambda row: (math.isnan(row.difficulty), row.difficulty))


def responses_to(folder: RunFolder, iteration: int, prompt_id: str) -> list[ResponseRow]:
    """Return the responses to a prompt of an iteration, the best first; of one that was pruned, those of its pairs.

    Raises:
        UserError: if they cannot be read.
    """
    store = folder.iteration(iteration)
    pairs = []
    if store.pairs_path.exists():
        pairs = [pair for pair in store.read_pairs() if pair.prompt_id == prompt_id]
    if store.pruned:
        return [
            ResponseRow(mark, reward, len(token_ids), "", text)
            for pair in pairs
            for mark, reward, token_ids, text in (
                ("chosen", pair.chosen_reward, pair.chosen_token_ids, pair.chosen),
                ("rejected", pair.rejected_reward, pair.rejected_token_ids, pair.rejected),
            )
        ]
    chosen = {pair.chosen_sample_index for pair in pairs}
    rejected = {pair.rejected_sample_index for pair in pairs}
    rows = [
        ResponseRow(
            " ".join(
                name
                for name, there in (
                    ("chosen", row.sample_index in chosen),
                    ("rejected", row.sample_index in rejected),
                    (row.drop_reason or "", row.drop_reason is not None),
                )
                if there
            ),
            row.reward,
            row.length,
            row.finish_reason,
            row.response,
        )
        for row in store.shards.stream()
        if row.prompt_id == prompt_id
    ]
    return sorted(rows, key=lambda row: -math.inf if row.reward is None else row.reward, reverse=True)


def held_out_prompts(folder: RunFolder, finished: int) -> list[HeldOutRow]:
    """Return the held-out prompts, those with the largest gain first.

    Args:
        folder: the run.
        finished: iterations of the last policy that was evaluated.
    """
    before = load_evaluation(folder.evaluation("000")) or []
    last = load_evaluation(folder.evaluation(f"{finished:03d}")) or []
    after = {row.prompt_id: row.reward for row in last}
    rows = [HeldOutRow(row.prompt_id, row.prompt, row.reward, after.get(row.prompt_id)) for row in before]
    return sorted(rows, key=_gain, reverse=True)


def _gain(row: HeldOutRow) -> float:
    gain = math.nan if row.before is None or row.after is None else row.after - row.before
    return -math.inf if math.isnan(gain) else gain


def held_out_answers(folder: RunFolder, finished: int, prompt_id: str) -> list[ResponseRow]:
    """Return the answers to a held-out prompt, from the initial policy's to the last one's."""
    found = []
    for number in range(finished + 1):
        for row in load_evaluation(folder.evaluation(f"{number:03d}")) or []:
            if row.prompt_id == prompt_id:
                name = "initial policy" if number == 0 else f"after {number} iteration(s)"
                found.append(ResponseRow(name, row.reward, row.length, row.finish_reason, row.response))
    return found
