"""Optimizer steps and micro-batches. Shapes: B pairs of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sppo_lightning.losses import LossInputs, PairLogps, PairValues, PreferenceLoss
from sppo_lightning.pair_forward.layouts import PairLayout, PairRows
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.types import PreferencePair, UserError


class PairBatch(NamedTuple):
    """One micro-batch of preference pairs; see :class:`~sppo_lightning.losses.LossInputs`."""

    rows: PairRows
    reference: PairLogps  # [B] each, float64, nats; NaN: no reference pass was made
    reference_tokens: PairLogps | None  # [B, T] each, float64, nats; None: not stored
    lengths: PairValues  # [B] each, tokens
    rewards: PairValues  # [B] each
    win_probabilities: PairValues  # [B] each; NaN: not known
    weights: Tensor  # [B] float32, 1 for a real pair, 0 for a padding pair
    slot: StepSlot

    def loss_inputs(
        self, policy: PairLogps, policy_tokens: PairLogps | None, collision_entropy: PairValues | None
    ) -> LossInputs:
        """Return what the loss reads, given what was read of the pairs under the policy."""
        return LossInputs(
            policy,
            self.reference,
            self.lengths,
            self.rewards,
            self.win_probabilities,
            policy_tokens,
            self.reference_tokens,
            collision_entropy,
        )


class StepSlot(NamedTuple):
    """Where a micro-batch stands in its iteration."""

    step: int  # optimizer step in the iteration
    steps: int  # optimizer steps of the iteration
    step_pairs: int  # real pairs of the step, all ranks together
    first_in_step: bool  # whether no micro-batch of the step comes before
    last_in_step: bool  # whether the optimizer steps after this micro-batch
    seed: int = 0  # the run's

    @property
    def ends_iteration(self) -> bool:
        """Whether no optimizer step of the iteration comes after this micro-batch."""
        return self.last_in_step and self.step == self.steps - 1


class MicroBatch(NamedTuple):
    """Rows of one micro-batch on one rank; rows from ``real`` on are padding pairs of weight 0."""

    rows: list[int]
    real: int
    slot: StepSlot


def accumulation_steps(*, pairs_per_step: int, batch_size: int, world_size: int) -> int:
    """Return how many micro-batches a rank runs for one optimizer step.

    Raises:
        UserError: if the sizes do not divide.
    """
    per_pass = batch_size * world_size
    if pairs_per_step % per_pass:
        raise UserError(
            f"data.pairs_per_step={pairs_per_step} is no multiple of data.batch_size={batch_size} x "
            f"{world_size} process(es) = {per_pass}: change one of them"
        )
    return pairs_per_step // per_pass


def pairs_consumed(steps: int, *, pairs: int, pairs_per_step: int) -> int:
    """Return the pairs that so many optimizer steps of an iteration consumed: the inverse of :func:`steps_taken`."""
    epochs, rest = divmod(steps, -(-pairs // pairs_per_step))
    return epochs * pairs + rest * pairs_per_step


class StepSampler(Sampler[MicroBatch | None]):
    """Cuts one global order of pairs into optimizer steps, and each step into this rank's micro-batches.

    Step s takes ``pairs_per_step`` pairs of the order. Inside a step, where order means nothing, pairs of similar
    length go together, longest first, and are dealt out so that all ranks have similar lengths at the same time. The
    last step may be partial; ranks that get fewer of its pairs run padding pairs of weight 0, so that all run equally
    many passes.

    Args:
        order: row numbers of all pairs, in training order.
        pairs_per_step: pairs of one optimizer step, all ranks together.
        batch_size: pairs of one micro-batch on one rank.
        lengths: tokens of each pair, by row number; ``None``: all alike.
        rank: this process.
        world_size: all processes.
        epoch: epoch inside the iteration.
        epochs: epochs of the iteration.
        first_step: of this epoch, where a run is resumed. Where that leaves none, the only micro-batch is
            ``None``: Lightning trains nothing on it, and continues with what follows an epoch's last batch.
        seed: the run's.
    """

    def __init__(
        self,
        order: Sequence[int],
        *,
        pairs_per_step: int,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        epochs: int = 1,
        first_step: int = 0,
        seed: int = 0,
    ) -> None:
        self.order = list(order)
        self.lengths = lengths
        self.pairs_per_step = pairs_per_step
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.epochs = epochs
        self.first_step = first_step
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self.order) // self.pairs_per_step)

    def __len__(self) -> int:
        return sum(len(self._passes(step)) for step in self._steps) or int(self._is_over)

    @property
    def _is_over(self) -> bool:
        """Whether all of the epoch's steps were taken before."""
        return 0 < self.steps_per_epoch == self.first_step

    @property
    def _steps(self) -> range:
        return range(self.first_step, self.steps_per_epoch)

    def _passes(self, step: int) -> list[list[int]]:
        """Return the rows of a step, cut into what all ranks run at the same time."""
        rows = self.order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
        lengths = self.lengths
        if lengths is not None:
            rows.sort(key=lambda row: lengths[row], reverse=True)
        together = self.batch_size * self.world_size
        return [rows[start : start + together] for start in range(0, len(rows), together)]

    def __iter__(self) -> Iterator[MicroBatch | None]:
        if self._is_over:
            yield None
        for step in self._steps:
            passes = self._passes(step)
            for number, rows in enumerate(passes):
                mine = rows[self.rank :: self.world_size]
                slot = StepSlot(
                    step=self.epoch * self.steps_per_epoch + step,
                    steps=self.epochs * self.steps_per_epoch,
                    step_pairs=sum(map(len, passes)),
                    first_in_step=number == 0,
                    last_in_step=number == len(passes) - 1,
                    seed=self.seed,
                )
                yield MicroBatch(mine or rows[-1:], len(mine), slot)


def collate(pairs: Sequence[PreferencePair], *, layout: PairLayout, real: int, slot: StepSlot) -> PairBatch:
    """Lay pairs out as one micro-batch.

    Args:
        pairs: the pairs, padding pairs last.
        layout: of their tokens.
        real: how many of them count.
        slot: where the micro-batch stands in its iteration.
    """
    weights = torch.zeros(len(pairs))
    weights[:real] = 1.0
    tokens = [(pair.reference_chosen_token_logps, pair.reference_rejected_token_logps) for pair in pairs]
    stored = any(chosen or rejected for chosen, rejected in tokens)
    return PairBatch(
        rows=layout.rows(
            [pair.prompt_token_ids for pair in pairs],
            [pair.chosen_token_ids for pair in pairs],
            [pair.rejected_token_ids for pair in pairs],
        ),
        reference=PairLogps(*_sides(pairs, "reference_chosen_logp", "reference_rejected_logp")),
        reference_tokens=PairLogps(*_padded(tokens)) if stored else None,
        lengths=PairValues(
            torch.tensor([float(len(pair.chosen_token_ids)) for pair in pairs], dtype=torch.float64),
            torch.tensor([float(len(pair.rejected_token_ids)) for pair in pairs], dtype=torch.float64),
        ),
        rewards=PairValues(*_sides(pairs, "chosen_reward", "rejected_reward")),
        win_probabilities=PairValues(*_sides(pairs, "chosen_win_probability", "rejected_win_probability")),
        weights=weights,
        slot=slot,
    )


def _sides(pairs: Sequence[PreferencePair], *names: str) -> list[Tensor]:
    """Return attributes of the pairs, ``[B]`` float64 each."""
    return [torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64) for name in names]


def _padded(tokens: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Tensor]:
    """Return chosen and rejected token log-probs, ``[B, T]`` float64 each, 0 after a response's end."""
    longest = max(len(side) for pair in tokens for side in pair)
    rows = [
        [[*side, *[0.0] * (longest - len(side))] for side in sides] for sides in zip(*tokens, strict=True)
    ]
    return [torch.tensor(side, dtype=torch.float64) for side in rows]


def check_pairs(pairs: PairTable, loss: PreferenceLoss) -> None:
    """Refuse pairs without the win probabilities that a loss reads, as it would be NaN.

    Raises:
        UserError: naming the first such pair's prompt.
    """
    if not loss.needs_win_probabilities:
        return
    known = pairs.statistics()
    lacking = known["chosen_win_probability"].isnan() | known["rejected_win_probability"].isnan()
    if bool(lacking.any()):
        first = pairs.prompt_ids[int(lacking.nonzero()[0])]
        raise UserError(
            f"model.loss {type(loss).__name__} needs win probabilities, but {int(lacking.sum())} of {len(pairs)} pairs "
            f"have none, first that of prompt {first!r}: use another loss, or a reward that gives one for each response"
        )


class PairDataset(Dataset[PairBatch | None]):
    """An iteration's pairs, handed out as micro-batches.

    Args:
        pairs: the pairs.
        layout: of a micro-batch's tokens.
    """

    def __init__(self, pairs: Sequence[PreferencePair], layout: PairLayout) -> None:
        self.pairs = pairs
        self.layout = layout

    def __getitem__(self, micro: MicroBatch | None) -> PairBatch | None:
        if micro is None:
            return None
        pairs = [self.pairs[row] for row in micro.rows]
        return collate(pairs, layout=self.layout, real=micro.real, slot=micro.slot)
