"""How far the policy has moved, read on held-out answers: an estimate of the KL divergence.

The policy reads answers that an earlier policy gave, and whose log-probs under that policy are stored. The mean of
log π_earlier(y) − log π_now(y) over them estimates KL(π_earlier ‖ π_now) along greedy answers, without loading the
earlier policy again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sppo_lightning.evaluation.stored import LOGPS, stored_logps
from sppo_lightning.losses import PairLogps
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.logprobs import summed
from sppo_lightning.system.durable import with_checksum, write_atomically
from sppo_lightning.training.batching import PairBatch, StepSlot, collate
from sppo_lightning.types import EncodedPrompt, PreferencePair, Rollout

PROMPTS = 32  # held-out prompts that are read: the first ones


@dataclass(frozen=True)
class AnswerReader:
    """Reads held-out answers with the policy, by the forward of training.

    Args:
        prompts: the held-out prompts; the first :data:`PROMPTS` are read.
        read: returns the log-probs of a batch's response tokens, ``[B, T]`` each, nats; a collective where the weights
            are sharded.
        layout: of a batch.
        batch_size: prompts at once.
    """

    prompts: Sequence[EncodedPrompt]
    read: Callable[[PairBatch], PairLogps]
    layout: PairLayout
    batch_size: int

    def logps(
        self, first: Mapping[str, tuple[int, ...]], second: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the summed log-probs of two sets of answers under the policy, by prompt id, nats.

        Args:
            first: token ids by prompt id.
            second: the same of other answers.
        """
        pairs = [
            PreferencePair(
                prompt_id=item.prompt.id,
                prompt_token_ids=item.token_ids,
                chosen_token_ids=first[item.prompt.id],
                rejected_token_ids=second[item.prompt.id],
                chosen="",
                rejected="",
                chosen_reward=math.nan,
                rejected_reward=math.nan,
            )
            for item in self.prompts[:PROMPTS]
            if first.get(item.prompt.id) and second.get(item.prompt.id)
        ]
        found: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            slot = StepSlot(step=0, steps=1, step_pairs=len(batch), first_in_step=True, last_in_step=True)
            sides = summed(self.read(collate(batch, layout=self.layout, real=len(batch), slot=slot)))
            for logps, side in zip(found, sides, strict=True):
                logps.update(zip((pair.prompt_id for pair in batch), side.tolist(), strict=True))
        return found


def read_answers(
    reader: AnswerReader,
    now: Sequence[Rollout],
    earlier: Mapping[str, tuple[Sequence[Rollout], Path]],
    place: Path,
    *,
    writes: bool,
) -> dict[str, float]:
    """Store the log-probs of the policy's own answers; return its divergence from earlier policies, nat per token.

    Each prompt's is stored, too.

    Args:
        reader: of the policy.
        now: its own answers.
        earlier: by name, an earlier policy's answers and the folder where their log-probs are stored.
        place: where those of ``now`` are stored.
        writes: whether this process is the one that writes.
    """
    own_tokens = _tokens(now)
    divergences: dict[str, dict[str, float]] = {}
    own: dict[str, float] = {}
    for name, (rows, folder) in earlier.items():
        tokens, stored = _tokens(rows), stored_logps(folder)
        own, others = reader.logps(own_tokens, tokens)
        drops = {
            key: (stored[key] - logp) / len(tokens[key]) for key, logp in others.items() if key in stored
        }
        if drops:
            divergences[name] = drops
    if not earlier:
        own, _ = reader.logps(own_tokens, own_tokens)
    if writes:
        write_atomically(place / LOGPS, with_checksum({"logps": own, "divergences": divergences}))
    return {
        name: float(torch.tensor(list(drops.values()), dtype=torch.float64).mean())
        for name, drops in divergences.items()
    }


def _tokens(rows: Sequence[Rollout]) -> dict[str, tuple[int, ...]]:
    return {row.prompt_id: tuple(row.token_ids) for row in rows}
