"""Preference pairs in columns."""

from __future__ import annotations

import gc
import math
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.prompts import ragged as ragged_module
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PAIR_SCHEMA, PairTable
from sppo_lightning.store.tables import write_table
from sppo_lightning.types import PreferencePair, UserError

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
PAIRS = st.lists(
    st.builds(
        PreferencePair,
        prompt_id=st.text(max_size=4),
        prompt_token_ids=TOKENS,
        chosen_token_ids=TOKENS,
        rejected_token_ids=TOKENS,
        chosen=st.text(max_size=4),
        rejected=st.text(max_size=4),
        chosen_reward=st.floats(),
        rejected_reward=st.floats(),
        reference_chosen_logp=st.floats(),
        reference_rejected_logp=st.floats(),
        chosen_win_probability=st.floats(),
        rejected_win_probability=st.floats(),
        chosen_sample_index=st.integers(-1, 2**31 - 1),
        rejected_sample_index=st.integers(-1, 2**31 - 1),
    ),
    max_size=7,
)
NAN = float("nan")


def pair(number: int, **changes: object) -> PreferencePair:
    plain = PreferencePair(
        prompt_id=f"p{number}",
        prompt_token_ids=tuple(range(number + 1)),
        chosen_token_ids=tuple(range(100, 102 + number)),
        rejected_token_ids=(200,),
        chosen=f"chosen {number}",
        rejected=f"rejected {number}",
        chosen_reward=number + 0.1,
        rejected_reward=-0.1 * number,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def pairs(count: int) -> list[PreferencePair]:
    return [pair(number) for number in range(count)]


def same(left: object, right: object) -> bool:
    """Equality of lists of pairs, with NaN equal to NaN."""
    return repr(left) == repr(right)


# ------------------------------------------------------------------ as a sequence


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_what_goes_in_comes_out(expected: list[PreferencePair]) -> None:
    table = PairTable.collect(expected)
    assert len(table) == len(expected)
    assert same(list(table), expected)
    assert same([table[row] for row in range(len(expected))], expected)
    assert all(
        isinstance(tokens, tuple) for found in table for tokens in vars(found).values() if tokens == ()
    )
    assert table.table.schema == PAIR_SCHEMA


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.slices(7))
def test_slices_are_those_of_a_list(expected: list[PreferencePair], part: slice) -> None:
    found = PairTable.collect(expected)[part]
    assert isinstance(found, list)
    assert same(found, expected[part])


def test_negative_rows_count_from_the_end() -> None:
    expected = pairs(3)
    table = PairTable.collect(expected)
    assert same([table[row] for row in (-1, -2, -3)], expected[::-1])
    assert same(list(reversed(table)), expected[::-1])


@pytest.mark.parametrize("row", [3, -4, 100])
def test_a_row_that_is_not_there(row: int) -> None:
    table = PairTable.collect(pairs(3))
    with pytest.raises(IndexError, match=rf"^row {row} of 3 pairs$"):
        table[row]


def test_an_empty_table() -> None:
    table = PairTable.collect([])
    assert len(table) == 0
    assert list(table) == table[:] == table.prompt_ids == []
    assert table.lengths("chosen_token_ids").shape == (0,)
    assert {column.shape for column in table.statistics().values()} == {(0,)}
    assert len(table.with_reference([], [])) == len(table.kept([])) == 0
    with pytest.raises(IndexError, match=r"^row 0 of 0 pairs$"):
        table[0]
    with pytest.raises(IndexError, match=r"^row -1 of 0 pairs$"):
        table[-1]


def test_pairs_are_taken_one_by_one() -> None:
    alive: weakref.WeakSet[PreferencePair] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[PreferencePair]:
        nonlocal most
        for number in range(9):
            one = pair(number)
            alive.add(one)
            most = max(most, len(alive))
            yield one

    assert same(list(PairTable.collect(stream())), pairs(9))
    assert most <= 2  # the one that is made, and the one before


@pytest.mark.parametrize("count", [0, 3, 4, 5, 9])
def test_iterating_misses_no_pair(count: int) -> None:
    assert same(list(PairTable.collect(pairs(count))), pairs(count))


@pytest.mark.parametrize("values", [10, 12, 25, 1000])
def test_columns_that_one_chunk_of_arrow_cannot_hold(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest text has 10 letters, the longest row of tokens seven."""
    plain = PairTable.collect(pairs(6))
    monkeypatch.setattr(ragged_module, "CHUNK_VALUES", values)
    table = PairTable.collect(pairs(6))
    chunks = [sum(map(len, chunk.to_pylist())) for chunk in table.table["rejected"].chunks]
    assert max(chunks) <= values
    assert (len(chunks) > 1) == (values < 60)
    assert same(list(table), pairs(6))
    assert same(table[::-2], pairs(6)[::-2])
    assert table.lengths("chosen_token_ids").tolist() == [2, 3, 4, 5, 6, 7]
    assert repr(table.statistics()) == repr(plain.statistics())
    mask = [True, False, True, True, False, True]
    changed = table.kept(mask).with_reference([-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0])
    assert same(list(changed), list(plain.kept(mask).with_reference([-1, -2, -3, -4], [-5, -6, -7, -8])))


# ----------------------------------------------------------------------- columns


def test_lengths_and_ids_by_hand() -> None:
    table = PairTable.collect(pairs(3))
    assert table.prompt_ids == ["p0", "p1", "p2"]
    assert table.lengths("prompt_token_ids").tolist() == [1, 2, 3]
    assert table.lengths("chosen_token_ids").tolist() == [2, 3, 4]
    assert table.lengths("rejected_token_ids").tolist() == [1, 1, 1]
    assert table.lengths("chosen_token_ids").dtype == torch.long


def test_statistics_by_hand() -> None:
    """Float64, so that a reward comes out as it went in."""
    table = PairTable.collect([pair(0), pair(1, reference_chosen_logp=-2.5, reference_rejected_logp=-0.1)])
    found = {name: column.tolist() for name, column in table.statistics().items()}
    assert same(
        found,
        {
            "chosen_reward": [0.1, 1.1],
            "rejected_reward": [-0.0, -0.1],
            "reference_chosen_logp": [NAN, -2.5],
            "reference_rejected_logp": [NAN, -0.1],
            "chosen_win_probability": [NAN, NAN],
            "rejected_win_probability": [NAN, NAN],
            "chosen_length": [2.0, 3.0],
            "rejected_length": [1.0, 1.0],
        },
    )
    assert {column.dtype for column in table.statistics().values()} == {torch.float64}


def test_a_win_probability_that_is_not_known_is_a_null() -> None:
    """In the file, so that whoever reads it need not know; a pair has NaN."""
    table = PairTable.collect([pair(0, chosen_win_probability=0.75), pair(1)])
    assert table.table["chosen_win_probability"].to_pylist() == [0.75, None]
    assert table.table["rejected_win_probability"].to_pylist() == [None, None]
    assert [found.chosen_win_probability for found in table] == pytest.approx([0.75, NAN], nan_ok=True)
    assert table.statistics()["chosen_win_probability"].tolist() == pytest.approx([0.75, NAN], nan_ok=True)


def test_the_reference_is_filled_in_beside_everything_else() -> None:
    table = PairTable.collect(pairs(2))
    filled = table.with_reference([-1.5, -2.5], [-3.5, NAN])
    assert same(
        list(filled),
        [
            pair(0, reference_chosen_logp=-1.5, reference_rejected_logp=-3.5),
            pair(1, reference_chosen_logp=-2.5, reference_rejected_logp=NAN),
        ],
    )
    assert filled.table.schema == PAIR_SCHEMA
    assert math.isnan(table[0].reference_chosen_logp)  # the table itself stays as it was


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.data())
def test_kept_pairs_are_those_under_the_mask(expected: list[PreferencePair], data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(expected), max_size=len(expected)))
    kept = PairTable.collect(expected).kept(mask)
    assert same(list(kept), [one for one, keep in zip(expected, mask, strict=True) if keep])
    assert kept.lengths("prompt_token_ids").tolist() == [len(one.prompt_token_ids) for one in kept]


# ------------------------------------------------------------------------ memory


def fresh(count: int) -> list[PreferencePair]:
    """Pairs of 300 tokens whose ids are objects of their own, as a tokenizer and a sampler make them."""
    tokens = torch.randint(
        1000, 150_000, (count, 3, 100), generator=torch.Generator().manual_seed(0)
    ).tolist()
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return [pair(0, **dict(zip(names, map(tuple, row), strict=True))) for row in tokens]


@pytest.mark.slow
def test_a_table_takes_less_than_a_third_of_its_objects() -> None:
    """Python's own allocations and Arrow's, of 2,000 pairs of 300 tokens."""
    PairTable.collect(pairs(1))  # what Arrow imports at its first use is not the table's
    gc.collect()
    tracemalloc.start()
    arrow, python = pa.total_allocated_bytes(), tracemalloc.get_traced_memory()[0]
    objects = fresh(2000)
    gc.collect()
    objects_bytes = tracemalloc.get_traced_memory()[0] - python
    table = PairTable.collect(objects)
    del objects
    gc.collect()
    table_bytes = tracemalloc.get_traced_memory()[0] - python + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert table.lengths("chosen_token_ids").sum() == 200_000
    assert 4 * 600_000 < table_bytes < objects_bytes / 3


def test_a_file_of_before_there_were_more_columns_reads_as_if_it_had_them(tmp_path: Path) -> None:
    """Bit by bit what was written then, and nothing known of what was not."""
    known = [pair(number, chosen_win_probability=0.5, chosen_sample_index=3) for number in range(3)]
    old = PairTable.collect(known).table.select(PAIR_SCHEMA.names[:10])
    assert old.schema.names[-1] == "reference_rejected_logp"
    write_table(tmp_path / "pairs.parquet", old)
    found = IterationStore(tmp_path).read_pairs()
    assert same(list(found), pairs(3))
    assert found.table.schema == PAIR_SCHEMA
    write_table(tmp_path / "pairs.parquet", old.slice(0, 0))
    assert list(IterationStore(tmp_path).read_pairs()) == []
    write_table(tmp_path / "pairs.parquet", old.drop_columns("chosen_reward"))
    with pytest.raises(UserError, match=r"pairs\.parquet is damaged"):
        IterationStore(tmp_path).read_pairs()
