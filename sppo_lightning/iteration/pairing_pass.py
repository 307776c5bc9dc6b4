"""From an iteration's stored responses to its pairs, prompt by prompt, in one pass over the shards."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sppo_lightning.iteration.counters import ResponseCounters
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.pairing import pair_responses
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.shards import ShardStore, by_prompt, merged
from sppo_lightning.types import EncodedPrompt, PreferencePair


@dataclass(frozen=True)
class PairingPass:
    """What one pass over an iteration's responses finds.

    Args:
        rules: the scientific settings.
        prompts: encoded prompts by id.
        iteration: self-play iteration.
        probed: indices of the samples that were taken of all candidates, by prompt id; others were topped up.
        counters: counts of all responses.
        rewards: usable rewards of the prompts that have a pair, by prompt id.
        dropped: why the other selected prompts have none.
        dropped_choices: why choices of the pairing rule became no pair.
    """

    rules: IterationRules
    prompts: Mapping[str, EncodedPrompt]
    iteration: int
    probed: Mapping[str, range] = field(default_factory=dict)
    counters: ResponseCounters = field(default_factory=ResponseCounters)
    rewards: dict[str, array[float]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_choices: Counter[str] = field(default_factory=Counter)

    def pairs(self, shards: ShardStore, candidates: Iterable[str], selected: Collection[str]) -> PairTable:
        """Count all responses, and return the pairs of the selected prompts, in the order of the candidates.

        Args:
            shards: the scored responses, ``probe`` and ``topup``.
            candidates: ids of all prompts that occur, in the order of the shards.
            selected: ids of the prompts to train on.
        """
        return PairTable.collect(self._paired(shards, candidates, selected))

    def _paired(
        self, shards: ShardStore, candidates: Iterable[str], selected: Collection[str]
    ) -> Iterator[PreferencePair]:
        sources = (by_prompt(shards.stream(name)) for name in ("probe", "topup"))
        for prompt_id, rows in merged(candidates, *sources):
            self.counters.add(rows, probed=self.probed.get(prompt_id))
            if prompt_id not in selected:
                continue
            outcome = pair_responses(
                rows,
                self.prompts[prompt_id],
                self.rules.pairing,
                samples_per_prompt=self.rules.samples_per_prompt,
                iteration=self.iteration,
                seed=self.rules.seed,
            )
            self.dropped_choices.update(outcome.dropped_choices)
            if outcome.drop_reason is not None:
                self.dropped[outcome.drop_reason] += 1
                continue
            usable = (row.reward for row in rows if row.usable and row.reward is not None)
            self.rewards[prompt_id] = array("d", usable)
            yield from outcome.pairs
