"""One row for each prompt of an iteration: how difficult it was, what was sampled, and what became of it."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.pairing import main_drop_reason
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.types import ScoredRollout

PAIRED = "paired"


@dataclass
class Samples:
    """What is kept of a prompt's responses in one iteration: numbers, no texts.

    Args:
        probe: usable rewards of the probe, by sample index.
        topup: those of the responses that were sampled because the prompt was selected.
        lengths: tokens of all responses that are answers.
        texts: hashes of the usable responses' texts.
        unusable: reasons of the others.
    """

    probe: array[float] = field(default_factory=lambda: array("d"))
    topup: array[float] = field(default_factory=lambda: array("d"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    texts: set[int] = field(default_factory=set)
    unusable: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Iterable[ScoredRollout], *, probe: bool) -> None:
        """Add the responses of a shard.

        Args:
            rows: responses to this prompt.
            probe: whether all candidates were sampled, rather than the selected ones.
        """
        for row in rows:
            if row.finish_reason != "failed":
                self.lengths.append(row.length)
            if row.usable and row.reward is not None:
                (self.probe if probe else self.topup).append(row.reward)
                self.texts.add(hash(row.response))
            else:
                unscored = row.drop_reason is None and row.reward is None
                self.unusable["not_scored" if unscored else main_drop_reason([row])] += 1

    def update(self, other: Samples) -> None:
        """Add the responses of another shard to the same prompt."""
        self.probe += other.probe
        self.topup += other.topup
        self.lengths += other.lengths
        self.texts |= other.texts
        self.unusable += other.unusable

    @property
    def rewards(self) -> array[float]:
        """All usable rewards."""
        return self.probe + self.topup

    @property
    def fair(self) -> array[float]:
        """The rewards that were not sampled because the first ones were good: the probe's, where there was one."""
        return self.probe or self.topup


class PromptRow(NamedTuple):
    """A prompt in one iteration; NaN where something is not known."""

    prompt_id: str
    outcome: str  # ``paired``, or why the prompt has no pair
    selected: bool
    difficulty: float  # the mean reward that the selection saw
    reward: float  # mean over all responses
    spread: float  # sample standard deviation of the rewards
    responses: int
    length: float  # mean, tokens
    gap: float  # largest reward difference between chosen and rejected


def prompt_rows(
    samples: Mapping[str, Samples],
    difficulty: StatisticsTable | None,
    selected: set[str],
    pairs: PairTable | None,
    dropped: Mapping[str, float],
) -> list[PromptRow]:
    """Return a row for each prompt that has a difficulty or a response.

    Args:
        samples: of this iteration, by prompt id.
        difficulty: after the probe; ``None``: not known.
        selected: ids of the prompts to train on.
        pairs: of the iteration; ``None``: not known.
        dropped: prompts without a pair, by reason, as the manifest counts them.
    """
    known: dict[str, float] = {}
    if difficulty is not None:
        known = dict(zip(difficulty.prompt_ids, difficulty["difficulty"].tolist(), strict=True))
    gaps: dict[str, float] = {}
    if pairs is not None:
        numbers = (pairs.table[name].to_pylist() for name in ("chosen_reward", "rejected_reward"))
        for prompt_id, chosen, rejected in zip(pairs.prompt_ids, *numbers, strict=True):
            gaps[prompt_id] = max(chosen - rejected, gaps.get(prompt_id, -math.inf))
    rows = []
    for prompt_id in dict.fromkeys((*known, *samples, *gaps)):
        found = samples.get(prompt_id, Samples())
        chosen_for = prompt_id in selected or prompt_id in gaps
        outcome = (
            PAIRED
            if prompt_id in gaps
            else _outcome(found, dropped, selected=chosen_for, whole=pairs is not None)
        )
        rewards = found.rewards
        rows.append(
            PromptRow(
                prompt_id=prompt_id,
                outcome=outcome,
                selected=chosen_for,
                difficulty=known.get(prompt_id, math.nan),
                reward=mean(rewards),
                spread=_deviation(rewards),
                responses=len(rewards) + found.unusable.total(),
                length=mean(found.lengths),
                gap=gaps.get(prompt_id, math.nan),
            )
        )
    return rows


def _outcome(samples: Samples, dropped: Mapping[str, float], *, selected: bool, whole: bool) -> str:
    """Return why a prompt has no pair, by the reasons that the manifest counts.

    Args:
        samples: its responses.
        dropped: prompts by reason.
        selected: whether it was to be trained on.
        whole: whether the iteration's pairs are known.
    """
    if not selected:
        sampled = samples.rewards or samples.unusable
        if samples.unusable and not samples.rewards:
            return samples.unusable.most_common(1)[0][0]
        unscheduled = not sampled and dropped.get("not_scheduled", 0) and not dropped.get("not_selected", 0)
        return "not_scheduled" if unscheduled else "not_selected"
    if not whole:
        return "pending"
    rewards = samples.rewards
    if len(rewards) > 1:
        if max(rewards) > min(rewards):
            rest = [name for name in ("no_pair", "pair_not_selected", "repeated_pair") if dropped.get(name)]
            return rest[0] if len(rest) == 1 else "no_pair"
        return "identical_responses" if len(samples.texts) == 1 else "tied_rewards"
    return samples.unusable.most_common(1)[0][0] if samples.unusable else "unknown"


def mean(values: array[float] | array[int]) -> float:
    """Return the mean of some numbers; NaN without any."""
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: array[float]) -> float:
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
