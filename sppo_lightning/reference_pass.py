"""The reference's log-probs of an iteration's pairs: computed once, before the first optimizer step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from sppo_lightning.batching import PairBatch, StepSlot, collate
from sppo_lightning.layouts import PairLayout
from sppo_lightning.losses import PairLogps
from sppo_lightning.pairs import PairTable
from sppo_lightning.types import Ranks, UserError


class ReferencePolicy(Protocol):
    """The frozen reference of an iteration."""

    @property
    def reference_stays(self) -> bool:
        """Whether all iterations have the same reference."""

    @property
    def reads_together(self) -> bool:
        """Whether all processes have to read equally many batches, since each of them holds a part of the weights."""

    def reference_fingerprint(self) -> str:
        """Return a digest of the reference that is held."""

    def reference_pass(self) -> AbstractContextManager[None]:
        """Hold the reference in memory while the context lasts."""

    def reference_logps(self, batch: PairBatch) -> PairLogps:
        """Return the reference's log-probs of a batch, ``[B]`` each, float64, nats, on the CPU."""


class Report(Protocol):
    """Takes how far the pass has come: pairs done, pairs in all, tokens done."""

    def __call__(self, done: int, total: int, tokens: int, /) -> None:
        """Called before the first and after each batch."""


def reference_pass(
    pairs: PairTable,
    reference: ReferencePolicy,
    *,
    layout: PairLayout,
    batch_size: int,
    first_fingerprint: str | None,
    ranks: Ranks,
    report: Report,
) -> tuple[PairTable, str]:
    """Return the pairs with the reference's log-probs, and the reference's fingerprint.

    Pairs of similar length go together; each process takes its share of the batches.

    Args:
        pairs: in any order.
        reference: the frozen reference.
        layout: of the training forward.
        batch_size: pairs at once.
        first_fingerprint: of iteration 0's reference; ``None``: this is iteration 0.
        ranks: the processes.
        report: follows the pass.

    Raises:
        UserError: if the reference has to stay and is another one than iteration 0's.
    """
    order = pairs.tokens().argsort(descending=True, stable=True).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[ranks.rank :: ranks.world_size]
    sides = torch.full((2, len(pairs)), float("nan"), dtype=torch.float64)  # chosen, rejected
    total, done, tokens = sum(map(len, mine)), 0, 0
    if mine:
        report(done, total, tokens)
    with reference.reference_pass():
        fingerprint = reference.reference_fingerprint()
        if reference.reference_stays and first_fingerprint not in (None, fingerprint):
            raise UserError(
                f"the policy that the run started from has fingerprint {fingerprint}, but iteration 0 was trained "
                f"against {first_fingerprint}: put back the model (model.policy.pretrained, or lora.adapter) that the "
                "run was started with, or start anew in another trainer.default_root_dir"
            )
        for rows in mine:
            batch = _batch(pairs, rows, layout)
            logps = reference.reference_logps(batch)
            sides[:, rows] = torch.stack([logps.chosen, logps.rejected])
            done += len(rows)
            tokens += batch.rows.input_ids.numel()
            report(done, total, tokens)
        if reference.reads_together and len(mine) < -(-len(batches) // ranks.world_size):
            reference.reference_logps(_batch(pairs, batches[0], layout))  # for the others, who have one more
    for part in ranks.gather([sides]):
        sides = torch.where(sides.isnan(), part[0], sides)
    return pairs.with_reference(*sides.tolist()), fingerprint


def _batch(pairs: PairTable, rows: list[int], layout: PairLayout) -> PairBatch:
    slot = StepSlot(step=0, steps=1, step_pairs=len(rows), first_in_step=True, last_in_step=True)
    return collate([pairs[row] for row in rows], layout=layout, real=len(rows), slot=slot)
