"""The reference's log-probs of an iteration's pairs: computed once, before the first optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from sppo_lightning.losses import PairLogps
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.logprobs import summed
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.reference_parts import ReferenceParts, TokenLogps, cut_into_parts, digest
from sppo_lightning.training.batching import PairBatch, StepSlot, collate
from sppo_lightning.types import Ranks, UserError


class Reference(Protocol):
    """The frozen reference of an iteration; see :class:`~sppo_lightning.training.reference.FrozenReference`."""

    @property
    def is_fixed(self) -> bool:
        """Whether all iterations have the same reference."""

    @property
    def forward_is_collective(self) -> bool:
        """Whether all processes have to read equally many batches, since each of them holds a part of the weights."""

    def fingerprint(self) -> str:
        """Return a digest of the reference that is held."""

    def held(self) -> AbstractContextManager[None]:
        """Hold the reference in memory while the context lasts."""

    def logps_by_token(self, batch: PairBatch, /) -> PairLogps:
        """Return the reference's log-probs of a batch's tokens, ``[B, T]`` each, float64, nats, on the CPU."""


class Report(Protocol):
    """Takes how far the pass has come: pairs done, pairs in all, tokens done."""

    def __call__(self, done: int, total: int, tokens: int, /) -> None:
        """Called before the first and after each batch."""


def reference_pass(
    pairs: PairTable,
    reference: Reference,
    *,
    stored: ReferenceParts,
    layout: PairLayout,
    batch_size: int,
    first_fingerprint: str | None,
    stores_tokens: bool,
    ranks: Ranks,
    report: Report,
) -> tuple[PairTable, str]:
    """Return the pairs with the reference's log-probs, and the reference's fingerprint.

    Pairs of similar length go together; each process takes whole parts, which are stored as they are done.

    Args:
        pairs: in any order.
        reference: the frozen reference.
        stored: parts that were done before, and are to be done.
        layout: of the training forward.
        batch_size: pairs at once.
        first_fingerprint: of iteration 0's reference; ``None``: this is iteration 0.
        stores_tokens: keep the log-probs of single tokens too.
        ranks: the processes.
        report: follows the pass.

    Raises:
        UserError: if the reference has to stay and is another one than iteration 0's.
    """
    order = pairs.tokens().argsort(descending=True, stable=True).tolist()
    parts = cut_into_parts(order)
    sides = torch.empty(2, len(pairs), dtype=torch.float64)  # chosen, rejected
    by_token: TokenLogps = ([[]] * len(pairs), [[]] * len(pairs))
    with reference.held():
        fingerprint = reference.fingerprint()
        if reference.is_fixed and first_fingerprint not in (None, fingerprint):
            raise UserError(
                f"the policy that the run started from has fingerprint {fingerprint}, but iteration 0 was trained "
                f"against {first_fingerprint}: put back the model (model.policy.pretrained, or lora.adapter) that the "
                "run was started with, or start anew in another trainer.default_root_dir"
            )
        missing = ranks.same(
            _missing(pairs, parts, fingerprint, stored, stores_tokens) if ranks.rank == 0 else []
        )
        shares = [missing[rank :: ranks.world_size] for rank in range(ranks.world_size)]
        total, done, tokens = sum(len(parts[number]) for number in shares[ranks.rank]), 0, 0
        if total:
            report(done, total, tokens)
        for number in shares[ranks.rank]:
            sums: list[Tensor] = []
            tokens_of: TokenLogps = ([], [])
            for rows in _batches(parts[number], batch_size):
                ranks.check()
                batch = _batch(pairs, rows, layout)
                logps = reference.logps_by_token(batch)
                sums.append(torch.stack(summed(logps)))
                if stores_tokens:
                    for kept, side, lengths in zip(tokens_of, logps, batch.lengths, strict=True):
                        kept += [
                            row[: int(length)] for row, length in zip(side.tolist(), lengths, strict=True)
                        ]
                done += len(rows)
                tokens += batch.rows.input_ids.numel()
                report(done, total, tokens)
            provenance = digest(pairs, parts[number], fingerprint)
            stored.write(number, torch.cat(sums, dim=1), tokens_of if stores_tokens else None, provenance)
        if reference.forward_is_collective:
            passes = [sum(len(_batches(parts[number], batch_size)) for number in share) for share in shares]
            for _ in range(max(passes) - passes[ranks.rank]):  # for the others, who have more
                reference.logps_by_token(_batch(pairs, order[:1], layout))
    ranks.barrier("reference read")
    for number, rows in enumerate(parts):
        part = stored.read(number)
        assert part is not None
        sides[:, rows] = part.logps
        for column, found in zip(by_token, part.tokens or (), strict=False):
            for row, values in zip(rows, found, strict=True):
                column[row] = values
    chosen, rejected = sides.tolist()
    return pairs.with_reference(chosen, rejected, by_token if stores_tokens else None), fingerprint


def _missing(
    pairs: PairTable,
    parts: Sequence[Sequence[int]],
    fingerprint: str,
    stored: ReferenceParts,
    with_tokens: bool,
) -> list[int]:
    """Return the parts that are not stored as they would be now."""
    found = [stored.read(number) for number in range(len(parts))]
    return [
        number
        for number, (rows, part) in enumerate(zip(parts, found, strict=True))
        if part is None
        or (with_tokens and part.tokens is None)
        or part.provenance != digest(pairs, rows, fingerprint)
    ]


def _batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _batch(pairs: PairTable, rows: list[int], layout: PairLayout) -> PairBatch:
    slot = StepSlot(step=0, steps=1, step_pairs=len(rows), first_in_step=True, last_in_step=True)
    return collate([pairs[row] for row in rows], layout=layout, real=len(rows), slot=slot)
