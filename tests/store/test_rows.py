"""Responses read from their file as far as they are looked at."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.store.rows import StoredRollout, TokenColumn
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import Rollout, ScoredRollout

FIELDS = (
    *("prompt_id", "sample_index", "response", "token_ids", "length"),
    *("finish_reason", "reward", "reward_parts", "drop_reason", "usable"),
)
TEXT = st.text(max_size=6)
NUMBERS = st.floats() | st.just(math.nan)
ROLLOUTS = st.builds(
    Rollout,
    prompt_id=TEXT,
    sample_index=st.integers(0, 99),
    prompt=TEXT,
    response=TEXT,
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
    finish_reason=st.sampled_from(["stop", "length", "failed"]),
    reward=st.none() | NUMBERS,
    reward_parts=st.dictionaries(TEXT, NUMBERS, max_size=3),
    drop_reason=st.none() | TEXT,
)


def read(row: ScoredRollout) -> str:
    return repr([getattr(row, name) for name in FIELDS])  # NaN is not equal to itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@settings(max_examples=50, deadline=None)
@given(shards=st.lists(st.lists(ROLLOUTS, max_size=4), min_size=2, max_size=2))
def test_a_stored_response_reads_as_the_one_that_was_written(
    folder: Path, shards: list[list[Rollout]]
) -> None:
    store = ShardStore(folder)
    for number, rows in enumerate(shards):
        store.write("probe", number, rows)
    found = list(store.stream("probe"))
    assert all(isinstance(row, StoredRollout) for row in found)
    assert [read(row) for row in found] == [read(row) for rows in shards for row in rows]


def test_a_shard_of_several_row_groups_is_read_on(tmp_path: Path) -> None:
    rows = [
        Rollout(f"p{number}", 0, "Q", f"A{number}", (number,) * (number % 3), "stop", 1.0, {"n": number / 7})
        for number in range(2500)
    ]
    ShardStore(tmp_path).write("probe", 0, rows)
    found = list(ShardStore(tmp_path).stream())
    assert [read(row) for row in found] == [read(row) for row in rows]


def test_tokens_of_chunks_and_slices() -> None:
    lists = pa.array([[1], [2, 3], [], [4, 5, 6]], pa.list_(pa.int32()))
    column = TokenColumn(pa.chunked_array([lists[1:], lists[:2]]))
    assert list(column) == [(2, 3), (), (4, 5, 6), (1,), (2, 3)]
    assert list(column.lengths) == [2, 0, 3, 1, 2]
    assert list(TokenColumn(pa.chunked_array([lists[2:]]))) == [(), (4, 5, 6)]
    assert list(TokenColumn(pa.chunked_array([], pa.list_(pa.int32())))) == []
