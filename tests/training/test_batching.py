"""Optimizer steps and micro-batches."""

from __future__ import annotations

import math
from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.losses import DPOLoss, SPPOSoftLoss
from sppo_lightning.pair_forward.layouts import PairLayout, PlainLayout, SharedLayout
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.training.batching import (
    MicroBatch,
    PairDataset,
    StepSampler,
    StepSlot,
    accumulation_steps,
    check_pairs,
    collate,
    pairs_consumed,
)
from sppo_lightning.training.iteration_length import iteration_length, steps_taken
from sppo_lightning.types import PreferencePair, UserError

QUICK = settings(max_examples=50, deadline=None)
TOKENS = st.lists(st.integers(3, 99), min_size=1, max_size=6).map(tuple)
SLOT = StepSlot(step=2, steps=5, step_pairs=7, first_in_step=True, last_in_step=True)


def pair_of(
    prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...], number: int = 0
) -> PreferencePair:
    return PreferencePair(
        f"p{number}", prompt, chosen, rejected, "c", "r", 1.5 + number, 1.0, -number - 0.1, -number - 0.2
    )


# ------------------------------------------------------------ optimizer steps


def test_accumulation_golden() -> None:
    """32 pairs a step, 4 on each of 2 processes at once: 32 / 8 = 4 micro-batches."""
    assert accumulation_steps(pairs_per_step=32, batch_size=4, world_size=2) == 4
    assert accumulation_steps(pairs_per_step=8, batch_size=4, world_size=2) == 1


@pytest.mark.parametrize(("pairs", "batch", "world"), [(32, 3, 1), (4, 8, 1), (6, 2, 2)])
def test_sizes_that_do_not_divide(pairs: int, batch: int, world: int) -> None:
    message = (
        rf"^data\.pairs_per_step={pairs} is no multiple of data\.batch_size={batch} x {world} process\(es\)"
        rf" = {batch * world}: change one of them$"
    )
    with pytest.raises(UserError, match=message):
        accumulation_steps(pairs_per_step=pairs, batch_size=batch, world_size=world)


def test_sampler_golden() -> None:
    """Ten pairs, 8 a step, 2 at once on each of 2 ranks.

    Step 0 takes 8 pairs in two passes of 4, dealt out in turn. Step 1 has 2 pairs left: one a rank, in one pass.
    """
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    first, last = StepSlot(2, 4, 8, True, False), StepSlot(2, 4, 8, False, True)
    end = StepSlot(3, 4, 2, True, True)
    ranks = [
        StepSampler(order, pairs_per_step=8, batch_size=2, rank=rank, world_size=2, epoch=1, epochs=2)
        for rank in range(2)
    ]
    assert list(ranks[0]) == [
        MicroBatch([9, 7], 2, first),
        MicroBatch([5, 3], 2, last),
        MicroBatch([1], 1, end),
    ]
    assert list(ranks[1]) == [
        MicroBatch([8, 6], 2, first),
        MicroBatch([4, 2], 2, last),
        MicroBatch([0], 1, end),
    ]


def test_pairs_of_one_step_go_by_length() -> None:
    """Twelve pairs, 8 a step: row r has lengths[r] tokens; each step longest first, dealt out in turn.

    Step 0 takes rows 0 to 7, by length 5, 1, 7, 3 | 0, 6, 2, 4; equal lengths keep their order.
    """
    lengths = [4, 8, 3, 5, 2, 9, 4, 6, 1, 1, 7, 1]
    ranks = [
        StepSampler(range(12), pairs_per_step=8, batch_size=2, lengths=lengths, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [micro.rows for micro in ranks[0]] == [[5, 7], [0, 2], [10, 9]]
    assert [micro.rows for micro in ranks[1]] == [[1, 3], [6, 4], [8, 11]]


def test_a_rank_without_pairs_runs_fillers_of_the_same_step() -> None:
    """Three pairs left for 4 ranks: one each, and the last rank repeats a pair without weight."""
    found = [
        list(StepSampler([4, 5, 6], pairs_per_step=8, batch_size=2, rank=rank, world_size=4))
        for rank in range(4)
    ]
    slot = StepSlot(0, 1, 3, True, True)
    assert found == [
        [MicroBatch([4], 1, slot)],
        [MicroBatch([5], 1, slot)],
        [MicroBatch([6], 1, slot)],
        [MicroBatch([6], 0, slot)],
    ]


@QUICK
@given(
    total=st.integers(0, 40),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 3),
    data=st.data(),
)
def test_ranks_share_every_step(
    total: int, batch_size: int, world_size: int, accumulation: int, epochs: int, data: st.DataObject
) -> None:
    per_step = batch_size * world_size * accumulation
    order = data.draw(st.permutations(range(100, 100 + total)))
    epoch = data.draw(st.integers(0, epochs - 1))
    lengths = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=140, max_size=140))
    samplers = [
        StepSampler(
            order,
            pairs_per_step=per_step,
            batch_size=batch_size,
            lengths=lengths,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            epochs=epochs,
        )
        for rank in range(world_size)
    ]
    runs = [list(sampler) for sampler in samplers]
    steps = math.ceil(total / per_step)
    assert {len(run) for run in runs} == {len(sampler) for sampler in samplers} == {len(runs[0])}
    assert [sampler.steps_per_epoch for sampler in samplers] == [steps] * world_size
    for passes in zip(*runs, strict=True):
        assert len({micro.slot for micro in passes}) == 1
    for step in range(steps):
        slice_ = order[step * per_step : (step + 1) * per_step]
        ours = [[micro for micro in run if micro.slot.step == epoch * steps + step] for run in runs]
        assert sorted(row for run in ours for micro in run for row in micro.rows[: micro.real]) == sorted(
            slice_
        )
        dealt = [
            [row for place in zip_longest(*(micro.rows[: micro.real] for micro in passes)) for row in place]
            for passes in zip(*ours, strict=True)
        ]
        in_turn = [row for passes in dealt for row in passes if row is not None]
        if lengths is None:
            assert in_turn == slice_
        else:
            assert in_turn == sorted(slice_, key=lambda row: -lengths[row])
        for run in ours:
            if len(slice_) == per_step:
                assert len(run) == accumulation
            assert [micro.slot.last_in_step for micro in run] == [False] * (len(run) - 1) + [True]
            for micro in run:
                assert micro.slot.steps == epochs * steps
                assert micro.slot.step_pairs == len(slice_)
                assert 0 <= micro.real <= len(micro.rows) <= batch_size
                assert micro.rows
                assert set(micro.rows) <= set(slice_)
    assert sum(micro.real for run in runs for micro in run) == total


# ------------------------------------------------------------------ going on


def test_steps_and_pairs_golden() -> None:
    """Ten pairs an epoch, 4 a step: three steps an epoch, of 4, 4 and 2 pairs."""
    consumed = [0, 4, 8, 10, 14, 18, 20, 24]
    assert [pairs_consumed(steps, pairs=10, pairs_per_step=4) for steps in range(8)] == consumed
    assert [steps_taken(count, pairs=10, pairs_per_step=4) for count in consumed] == list(range(8))


def test_length_of_an_iteration_golden() -> None:
    assert iteration_length(10, pairs_per_step=4, epochs=2) == (20, 6)
    assert iteration_length(10, pairs_per_step=4, steps=7) == (28, 7)


@QUICK
@given(steps=st.integers(0, 60), pairs=st.integers(1, 30), pairs_per_step=st.integers(1, 12))
def test_steps_and_pairs_are_each_others_inverse(steps: int, pairs: int, pairs_per_step: int) -> None:
    consumed = pairs_consumed(steps, pairs=pairs, pairs_per_step=pairs_per_step)
    assert steps_taken(consumed, pairs=pairs, pairs_per_step=pairs_per_step) == steps
    more = pairs_consumed(steps + 1, pairs=pairs, pairs_per_step=pairs_per_step)
    assert 1 <= more - consumed <= pairs_per_step


def test_a_resumed_epoch_golden() -> None:
    """Ten pairs, 4 a step, one step behind: the second and the last, partial one are left."""
    left = StepSampler(range(10), pairs_per_step=4, batch_size=2, first_step=1)
    assert list(left) == [
        MicroBatch([4, 5], 2, StepSlot(1, 3, 4, True, False)),
        MicroBatch([6, 7], 2, StepSlot(1, 3, 4, False, True)),
        MicroBatch([8, 9], 2, StepSlot(2, 3, 2, True, True)),
    ]
    assert len(left) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_without_a_step_left_still_has_an_end(rank: int) -> None:
    left = StepSampler(range(10), pairs_per_step=4, batch_size=2, first_step=3, rank=rank, world_size=2)
    assert list(left) == [None]
    assert len(left) == 1
    assert PairDataset([], SharedLayout())[None] is None


def test_no_pairs_are_no_epoch() -> None:
    none = StepSampler([], pairs_per_step=4, batch_size=2)
    assert (list(none), len(none)) == ([], 0)


@QUICK
@given(
    total=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    later_world_size=st.integers(1, 3),
    data=st.data(),
)
def test_what_is_left_of_an_epoch_is_its_end(
    total: int, batch_size: int, world_size: int, later_world_size: int, data: st.DataObject
) -> None:
    """Also with another number of processes, of whom each step's pairs do not depend."""
    sizes = {"pairs_per_step": batch_size * 6, "batch_size": batch_size, "epoch": 1, "epochs": 2}
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=total, max_size=total))
    steps = -(-total // sizes["pairs_per_step"])
    first = data.draw(st.integers(0, steps))

    def samplers(processes: int, first_step: int) -> list[StepSampler]:
        return [
            StepSampler(
                range(total), lengths=lengths, rank=rank, world_size=processes, first_step=first_step, **sizes
            )
            for rank in range(processes)
        ]

    def real(found: list[StepSampler]) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {}
        for micro in (micro for sampler in found for micro in sampler if micro is not None):
            rows.setdefault(micro.slot.step, []).extend(micro.rows[: micro.real])
        return {step: sorted(taken) for step, taken in rows.items()}

    whole, left = real(samplers(world_size, 0)), real(samplers(later_world_size, first))
    assert left == {step: rows for step, rows in whole.items() if step >= steps + first}
    for sampler in samplers(world_size, first):
        assert len(list(sampler)) == len(sampler)
    if world_size == later_world_size and first < steps:
        for sampler, again in zip(samplers(world_size, 0), samplers(world_size, first), strict=True):
            assert list(sampler)[-len(again) :] == list(again)


# -------------------------------------------------------------- micro-batches


def test_collate_golden() -> None:
    """The last of two pairs is a filler."""
    pairs = [pair_of((11, 12), (21,), (31, 32)), pair_of((13,), (22, 23, 24), (33,), number=1)]
    batch = collate(pairs, layout=PlainLayout(0), real=1, slot=SLOT)
    assert batch.rows.input_ids.tolist() == [
        [11, 12, 21, 0],
        [13, 22, 23, 24],
        [11, 12, 31, 32],
        [13, 33, 0, 0],
    ]
    assert batch.rows.targets.tolist() == [21, 22, 23, 24, 31, 32, 33]
    assert batch.rows.places.tolist() == [0, 3, 4, 5, 6, 7, 9]
    assert batch.reference.chosen.tolist() == [-0.1, -1.1]
    assert batch.reference.rejected.tolist() == [-0.2, -1.2]
    assert batch.weights.tolist() == [1, 0]
    assert batch.slot == SLOT


def test_collate_dtypes() -> None:
    batch = collate([pair_of((1,), (2,), (3,))], layout=PlainLayout(0), real=1, slot=SLOT)
    for exact in batch.reference:
        assert exact.dtype == torch.float64
    assert batch.weights.dtype == torch.float32


@QUICK
@given(
    rows=st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=4),
    layout=st.sampled_from([PlainLayout(0), PlainLayout(50), SharedLayout()]),
    data=st.data(),
)
def test_collate_keeps_exactly_the_sampled_tokens(
    rows: list[tuple[tuple[int, ...], ...]], layout: PairLayout, data: st.DataObject
) -> None:
    """What is trained on, in the order of responses, and weights for real pairs only."""
    real = data.draw(st.integers(0, len(rows)))
    pairs = [pair_of(*row, number=number) for number, row in enumerate(rows)]
    batch = collate(pairs, layout=layout, real=real, slot=SLOT)
    responses = [row[1] for row in rows] + [row[2] for row in rows]
    assert batch.rows.targets.tolist() == [token for response in responses for token in response]
    assert batch.rows.responses == len(responses)
    assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(rows) - real)


def test_a_dataset_hands_out_micro_batches() -> None:
    pairs = [pair_of((11,), (21 + number,), (31,), number=number) for number in range(4)]
    batch = PairDataset(pairs, SharedLayout())[MicroBatch([2, 0, 0], 2, SLOT)]
    assert batch.rows.targets.tolist() == [23, 21, 21, 31, 31, 31]
    assert batch.reference.chosen.tolist() == [-2.1, -0.1, -0.1]
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.slot == SLOT


def test_pairs_without_win_probabilities_are_refused_to_a_loss_that_reads_them() -> None:
    """As an older version stored them, or a reward that gave some a NaN."""
    stored = [
        PreferencePair(f"p{number}", (1,), (2,), (3,), "", "", 1.0, 0.0, 0.0, 0.0, *wins)
        for number, wins in enumerate([(0.75, 0.25), (0.75, math.nan), (math.nan, math.nan)])
    ]
    message = r"^model\.loss SPPOSoftLoss needs win probabilities, but 2 of 3 pairs have none, first that of prompt 'p1"
    with pytest.raises(UserError, match=message):
        check_pairs(PairTable.collect(stored), SPPOSoftLoss(0.1))
    check_pairs(PairTable.collect(stored), DPOLoss(0.1))
    check_pairs(PairTable.collect(stored[:1]), SPPOSoftLoss(0.1))
    check_pairs(PairTable.collect([]), SPPOSoftLoss(0.1))
