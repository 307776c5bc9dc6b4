"""The Parquet store."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crash import CrashError

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS, StatisticsTable
from sppo_lightning.store.iterations import DIFFICULTY_SCHEMA, IterationStore
from sppo_lightning.store.pairs import PAIR_SCHEMA, PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import ROLLOUT_SCHEMA, ShardStore, read_rollouts, write_rollouts
from sppo_lightning.types import PreferencePair, Rollout, UserError

QUICK = settings(max_examples=30, deadline=None)
NAN, INF = float("nan"), float("inf")
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
NUMBERS = st.floats()  # NaN and the infinities among them
TEXT = st.text(max_size=8)
ROLLOUTS = st.builds(
    Rollout,
    prompt_id=TEXT,
    sample_index=st.integers(0, 2**31 - 1),
    prompt=TEXT,
    response=TEXT,
    token_ids=TOKENS,
    finish_reason=st.sampled_from(["stop", "length"]),
    reward=st.none() | NUMBERS,
    reward_parts=st.dictionaries(TEXT, NUMBERS, max_size=2),
    drop_reason=st.none() | TEXT,
)
PAIRS = st.builds(
    PreferencePair,
    prompt_id=TEXT,
    prompt_token_ids=TOKENS,
    chosen_token_ids=TOKENS,
    rejected_token_ids=TOKENS,
    chosen=TEXT,
    rejected=TEXT,
    chosen_reward=NUMBERS,
    rejected_reward=NUMBERS,
    reference_chosen_logp=NUMBERS,
    reference_rejected_logp=NUMBERS,
)


def rollout(number: int = 0, reward: float | None = 0.5) -> Rollout:
    return Rollout(f"p{number}", 0, "Say «é»", "naïve\n\u2028\x00", (5, 1), "stop", reward)


def difficulty_table() -> StatisticsTable:
    columns = {
        name: torch.tensor([number + 0.1, -number], dtype=torch.float64)
        for number, name in enumerate(DIFFICULTY_COLUMNS)
    }
    columns["estimated_iteration"] = torch.tensor([3.0, 0.0], dtype=torch.float64)
    columns["samples"] = torch.tensor([10.0, 2.0], dtype=torch.float64)
    return StatisticsTable(("b", "a"), columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property; each replaces the files of the one before."""
    return tmp_path_factory.mktemp("store")


# ----------------------------------------------------------------- round trips


@QUICK
@given(rows=st.lists(ROLLOUTS, max_size=4))
def test_rollouts_come_back_as_they_were(folder: Path, rows: list[Rollout]) -> None:
    write_rollouts(folder / "rollouts.parquet", rows)
    found = read_rollouts(folder / "rollouts.parquet")
    assert repr(found) == repr(rows)  # NaN is not equal to itself
    numbers = [value for row in rows for value in (row.reward, *row.reward_parts.values())]
    assert found == rows or any(value != value for value in numbers)


@QUICK
@given(pairs=st.lists(PAIRS, max_size=4))
def test_pairs_come_back_as_they_were(folder: Path, pairs: list[PreferencePair]) -> None:
    IterationStore(folder).write_pairs(PairTable.collect(pairs))
    assert repr(list(IterationStore(folder).read_pairs())) == repr(pairs)


def test_a_non_finite_reward_is_a_score_and_none_is_not(tmp_path: Path) -> None:
    rewards = [None, NAN, INF, -INF, 0.0, -0.0, 0.1]
    write_rollouts(tmp_path / "r.parquet", [rollout(n, reward) for n, reward in enumerate(rewards)])
    found = [row.reward for row in read_rollouts(tmp_path / "r.parquet")]
    assert repr(found) == repr(rewards)
    assert pq.read_table(tmp_path / "r.parquet")["reward"].null_count == 1


def test_difficulty_comes_back_as_it_was(tmp_path: Path) -> None:
    store, table = IterationStore(tmp_path), difficulty_table()
    store.write_difficulty(table, {"a", "not in the table"})
    found, selected = store.read_difficulty()
    assert selected == {"a"}
    assert found.prompt_ids == table.prompt_ids
    assert tuple(found.columns) == DIFFICULTY_COLUMNS
    for name in DIFFICULTY_COLUMNS:
        assert found[name].dtype == torch.float64
        assert found[name].tolist() == table[name].tolist(), name


def test_empty_tables_come_back_empty(tmp_path: Path) -> None:
    store = IterationStore(tmp_path)
    store.write_difficulty(difficulty_table().rows([]), set())
    store.write_pairs(PairTable.collect([]))
    store.shards.write("probe", 0, [])
    found, selected = store.read_difficulty()
    assert len(found) == 0
    assert not selected
    assert list(store.read_pairs()) == []
    assert store.shards.read("probe", 0) == []


def test_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    store = IterationStore(tmp_path / "000")
    assert store.read_manifest() is None
    assert not store.complete
    store.write_manifest({"complete": False, "seed": 42, "dropped": {"é": 1}, "values": [1.5, None]})
    assert not store.complete
    assert store.read_manifest() == {
        "complete": False,
        "seed": 42,
        "dropped": {"é": 1},
        "values": [1.5, None],
    }
    store.write_manifest({"complete": True})
    assert store.complete


# --------------------------------------------------------------- what is on disk


@pytest.mark.parametrize(
    ("schema", "columns"),
    [
        (
            ROLLOUT_SCHEMA,
            "prompt_id, sample_index, prompt, response, token_ids, finish_reason, reward, reward_parts, drop_reason",
        ),
        (
            PAIR_SCHEMA,
            "prompt_id, prompt_token_ids, chosen_token_ids, rejected_token_ids, chosen, rejected, "
            "chosen_reward, rejected_reward, reference_chosen_logp, reference_rejected_logp, "
            "chosen_win_probability, rejected_win_probability, chosen_sample_index, rejected_sample_index",
        ),
        (
            DIFFICULTY_SCHEMA,
            "prompt_id, difficulty, estimated_iteration, mean_reward, std_reward, min_reward, max_reward, "
            "samples, selected",
        ),
    ],
)
def test_columns_are_the_documented_ones(schema: pa.Schema, columns: str) -> None:
    assert schema.names == columns.split(", ")


def test_files_hold_those_columns_and_nothing_opaque(tmp_path: Path) -> None:
    """Every file is JSON, or Parquet with numbers, text, booleans and lists of token ids: no pickle."""
    store = RunFolder(tmp_path).iteration(7)
    store.shards.write("probe", 3, [rollout()])
    store.write_difficulty(difficulty_table(), {"a"})
    store.write_pairs(PairTable.collect([PreferencePair("p", (1,), (2,), (3,), "c", "r", 1, 0)]))
    store.write_manifest({"complete": True})
    home = tmp_path / "iterations" / "007"
    schemas = {
        home / "rollouts" / "probe-00003.parquet": ROLLOUT_SCHEMA,
        home / "difficulty.parquet": DIFFICULTY_SCHEMA,
        home / "pairs.parquet": PAIR_SCHEMA,
    }
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*schemas, home / "manifest.json"}
    json.loads((home / "manifest.json").read_text())
    plain = {pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.bool_(), pa.list_(pa.int32())}
    plain |= {pa.map_(pa.string(), pa.float64())}
    for path, schema in schemas.items():
        assert pq.read_schema(path).equals(schema)
        assert set(schema.types) <= plain


def test_where_files_lie(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.iteration(0).folder == tmp_path / "iterations" / "000"
    assert run.iteration(0).shards.folder == tmp_path / "iterations" / "000" / "rollouts"
    assert run.evaluation("002") == tmp_path / "evaluations" / "002"


def test_shards_are_read_in_order_and_by_name(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    assert list(store.read_all()) == []
    assert store.read("probe", 0) is None
    for number in (10, 2, 0):
        store.write("probe", number, [rollout(number)])
    store.write("topup", 1, [rollout(99)])
    assert [row.prompt_id for row in store.read_all("probe")] == ["p0", "p2", "p10"]
    assert [row.prompt_id for row in store.read_all()] == ["p0", "p2", "p10", "p99"]
    assert store.read("probe", 2) == [rollout(2)]
    store.write("probe", 2, [rollout(3)])
    assert store.read("probe", 2) == [rollout(3)]


# -------------------------------------------------------------------- atomicity


def test_a_reader_never_sees_a_shard_in_the_making(tmp_path: Path, crash: Callable[[], None]) -> None:
    store = IterationStore(tmp_path)
    store.shards.write("probe", 0, [rollout(0)])
    store.write_manifest({"complete": False})
    crash()
    writes: list[Callable[[], None]] = [
        lambda: store.shards.write("probe", 0, [rollout(5)]),
        lambda: store.shards.write("probe", 1, [rollout(6)]),
        lambda: store.write_manifest({"complete": True}),
    ]
    for write in writes:
        with pytest.raises(CrashError):
            write()
    assert list(store.shards.read_all()) == [rollout(0)]
    assert store.shards.read("probe", 1) is None
    assert not store.complete


# ----------------------------------------------------------------- damaged files


def damaged(path: Path) -> str:
    return f"^{re.escape(str(path))} is damaged \\(.+\\): restore it from a copy, or give the same command again, "


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Change one bit of the data, which alone would still be valid Parquet."""
    middle = content.index(b"\x28\xb5\x2f\xfd") + 12  # inside the first compressed page
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "harm", [cut, flip, lambda content: b"", lambda content: b"PAR1 something else PAR1"]
)
def test_a_damaged_file_is_named(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    store = IterationStore(tmp_path)
    store.shards.write("probe", 0, [rollout(number) for number in range(50)])
    store.write_difficulty(difficulty_table(), set())
    store.write_pairs(PairTable.collect([PreferencePair("p", (1,), (2,), (3,), "c", "r", 1, 0)] * 50))
    reads: dict[Path, Callable[[], Any]] = {
        store.shards.path("probe", 0): lambda: store.shards.read("probe", 0),
        tmp_path / "difficulty.parquet": store.read_difficulty,
        tmp_path / "pairs.parquet": store.read_pairs,
    }
    for path, read in reads.items():
        path.write_bytes(harm(path.read_bytes()))
        with pytest.raises(UserError, match=damaged(path)):
            read()


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    rows = [replace(rollout(number), reward=number / 7) for number in range(5)]
    write_rollouts(path, rows)
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 9):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]
        )
        try:
            assert read_rollouts(path) == rows  # a bit that carries nothing, such as of the writer's name
        except UserError:
            noticed += 1
    assert noticed > 50


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"prompt_id": ["p"], "reward": [1.0]}),
        pa.table({name: ["x"] for name in ROLLOUT_SCHEMA.names}),
        pa.table({name: [[1]] for name in ROLLOUT_SCHEMA.names}),
    ],
    ids=["columns", "text", "lists"],
)
def test_another_table_in_a_shards_place_is_named(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "probe-00000.parquet"
    pq.write_table(table, path)
    with pytest.raises(UserError, match=damaged(path)):
        ShardStore(tmp_path).read("probe", 0)


@pytest.mark.parametrize("content", [b"", b'{"complete": tr', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    store = IterationStore(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    message = (
        f"^{re.escape(str(tmp_path / 'manifest.json'))} is damaged \\(.+\\), and nothing else says which policy gave "
        "these rollouts: restore it from a copy; if iteration "
    )
    with pytest.raises(UserError, match=message):
        store.read_manifest()
    with pytest.raises(UserError, match=message):
        _ = store.complete


# -------------------------------------------------------- what rules may ask for


def test_usable_responses_are_measured_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    """``c`` was not probed; of ``b`` the second response has no finite reward, of ``a`` the first was dropped."""
    store = IterationStore(tmp_path).shards

    def row(key: str, index: int, reward: float, tokens: int, **changes: Any) -> Rollout:
        return replace(Rollout(key, index, "Q", "A", (1,) * tokens, "stop", reward), **changes)

    store.write("probe", 0, [row("b", 0, 0.5, 3), row("b", 1, math.nan, 9)])
    rows = [
        row("a", 0, 1, 9, drop_reason="unfinished"),
        row("a", 1, 2, 1),
        row("a", 2, 3, 2, finish_reason="length"),
    ]
    store.write("probe", 1, rows)
    store.write("topup", 0, [row("b", 2, 7, 7)])
    found = store.measured("probe", ("a", "c", "b"))
    assert found.rewards.tolist() == [2, 3, 0.5]
    assert found.lengths.tolist() == [1, 2, 3]
    assert found.ended_by("length").tolist() == [False, True, False]
    assert found.starts.tolist() == [0, 2, 2, 3]
    types = [column.dtype for column in (found.rewards, found.lengths, found.finish_codes)]
    assert types == [torch.float64, torch.int32, torch.int8]  # thirteen bytes a response


def test_no_responses_are_measured_as_none(tmp_path: Path) -> None:
    found = IterationStore(tmp_path).shards.measured("probe", ("a", "b"))
    assert (found.rewards.tolist(), found.starts.tolist()) == ([], [0, 0, 0])


def test_what_an_iteration_knew_of_some_prompts(tmp_path: Path) -> None:
    store, table = IterationStore(tmp_path), difficulty_table()
    store.write_difficulty(table, {"a"})
    found = store.known(("a", "new", "b"))
    assert found.prompt_ids == ("a", "new", "b")
    assert found["selected"].tolist() == pytest.approx([1, math.nan, 0], nan_ok=True)
    assert found["difficulty"][::2].tolist() == table.rows(("a", "b"))["difficulty"].tolist()
