"""Difficulty tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppo_lightning.difficulty import (
    DIFFICULTY_COLUMNS,
    REWARD_COLUMNS,
    ProbeResponses,
    StatisticsTable,
    empty_difficulty_table,
    estimate_difficulty,
    moved_with_policy,
    reward_statistics,
)
from sppo_lightning.types import UserError

QUICK = settings(max_examples=50, deadline=None)
REWARDS = st.dictionaries(
    st.text(max_size=4), st.lists(st.floats(-100, 100), min_size=1, max_size=6), max_size=6
)


def table(**difficulty: float) -> StatisticsTable:
    """A difficulty table; all other columns are 1."""
    values = torch.tensor(list(difficulty.values()), dtype=torch.float64)
    columns = {name: torch.ones_like(values) for name in DIFFICULTY_COLUMNS}
    return StatisticsTable(tuple(difficulty), {**columns, "difficulty": values})


def as_dict(statistics: StatisticsTable, name: str = "difficulty") -> dict[str, float]:
    return dict(zip(statistics.prompt_ids, statistics[name].tolist(), strict=True))


def test_reward_statistics_golden() -> None:
    """a: mean 2, variance (1 + 0 + 1) / 3 = 2/3; b: two equal rewards; c: one reward, no spread."""
    found = reward_statistics({"a": [1, 2, 3], "b": [-0.5, -0.5], "c": [4]})
    assert found.prompt_ids == ("a", "b", "c")
    assert tuple(found.columns) == REWARD_COLUMNS
    assert found["mean_reward"].tolist() == [2, -0.5, 4]
    assert found["std_reward"].tolist() == pytest.approx([math.sqrt(2 / 3), 0, 0])
    assert found["min_reward"].tolist() == [1, -0.5, 4]
    assert found["max_reward"].tolist() == [3, -0.5, 4]
    assert found["samples"].tolist() == [3, 2, 1]
    assert all(column.dtype == torch.float64 for column in found.columns.values())


def test_first_difficulty_golden() -> None:
    """Without an earlier estimate, difficulty is the mean reward: (1 + 2 + 6) / 3 = 3, (0 - 1) / 2 = -1/2."""
    statistics = reward_statistics({"a": [1, 2, 6], "b": [0, -1]})
    found = estimate_difficulty(statistics, empty_difficulty_table(), iteration=0, smoothing=0.25)
    assert tuple(found.columns) == DIFFICULTY_COLUMNS
    assert as_dict(found) == {"a": 3, "b": -0.5}
    assert found["estimated_iteration"].tolist() == [0, 0]
    assert found["samples"].tolist() == [3, 2]


def test_smoothed_difficulty_golden() -> None:
    """1/4 of the old plus 3/4 of the new mean: a: 8/4 + 3 * 4/4 = 5; b is new: 2; c keeps no row here."""
    statistics = reward_statistics({"b": [2], "a": [3, 5]})
    found = estimate_difficulty(statistics, table(c=9, a=8), iteration=3, smoothing=0.25)
    assert as_dict(found) == {"b": 2, "a": 5}
    assert as_dict(found, "mean_reward") == {"b": 2, "a": 4}
    assert found["estimated_iteration"].tolist() == [3, 3]


@QUICK
@given(rewards=REWARDS, old=st.floats(-100, 100))
def test_without_smoothing_the_old_estimate_does_not_matter(
    rewards: dict[str, list[float]], old: float
) -> None:
    statistics = reward_statistics(rewards)
    previous = StatisticsTable(
        tuple(rewards), {"difficulty": torch.full((len(rewards),), old, dtype=torch.float64)}
    )
    found = estimate_difficulty(statistics, previous, iteration=1, smoothing=0.0)
    assert found["difficulty"].tolist() == statistics["mean_reward"].tolist()


@QUICK
@given(rewards=REWARDS, smoothing=st.floats(0, 0.99), data=st.data())
def test_statistics_do_not_depend_on_any_order(
    rewards: dict[str, list[float]], smoothing: float, data: st.DataObject
) -> None:
    shuffled = {
        key: data.draw(st.permutations(rewards[key])) for key in data.draw(st.permutations(list(rewards)))
    }
    previous = table(**dict.fromkeys(list(rewards)[:2], 0.5))
    found = estimate_difficulty(reward_statistics(rewards), previous, iteration=2, smoothing=smoothing)
    other = estimate_difficulty(reward_statistics(shuffled), previous, iteration=2, smoothing=smoothing)
    for name in DIFFICULTY_COLUMNS:
        assert as_dict(other, name) == pytest.approx(as_dict(found, name), abs=1e-9)


@QUICK
@given(rewards=REWARDS)
def test_mean_lies_between_the_extremes(rewards: dict[str, list[float]]) -> None:
    found = reward_statistics(rewards)
    low, mean, high = found["min_reward"], found["mean_reward"], found["max_reward"]
    assert bool((low <= mean + 1e-9).all())
    assert bool((mean <= high + 1e-9).all())
    assert bool((found["std_reward"] <= (high - low) / 2 + 1e-9).all())  # Popoviciu
    assert len(found) == len(rewards)


def test_nothing_gives_empty_tables() -> None:
    found = estimate_difficulty(reward_statistics({}), table(a=1), iteration=1, smoothing=0.5)
    assert len(found) == 0
    assert tuple(found.columns) == DIFFICULTY_COLUMNS
    assert len(empty_difficulty_table()) == 0
    assert tuple(empty_difficulty_table().columns) == DIFFICULTY_COLUMNS


def test_rows_come_in_the_order_asked_for() -> None:
    found = table(a=1, b=2, c=3).rows(["c", "a"])
    assert found.prompt_ids == ("c", "a")
    assert found["difficulty"].tolist() == [3, 1]
    assert len(table(a=1).rows([])) == 0


def test_updated_golden() -> None:
    """b is replaced and d is new; both come after what is left of the old table."""
    found = table(a=1, b=2, c=3).updated(table(d=9, b=8))
    assert found.prompt_ids == ("a", "c", "d", "b")
    assert found["difficulty"].tolist() == [1, 3, 9, 8]


@QUICK
@given(
    old=st.dictionaries(st.sampled_from("abcdef"), st.floats(-9, 9)),
    new=st.dictionaries(st.sampled_from("abcdef"), st.floats(-9, 9)),
)
def test_updated_is_a_dictionary_update(old: dict[str, float], new: dict[str, float]) -> None:
    before = table(**old)
    assert as_dict(before.updated(table(**new))) == {**old, **new}
    assert as_dict(before) == old


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(AssertionError):
        StatisticsTable(("a", "b"), {"difficulty": torch.zeros(1)})


def test_aligned_rows_are_nan_where_nothing_is_known() -> None:
    found = table(a=1, b=2).aligned(("b", "x", "a", "b"))
    assert found.prompt_ids == ("b", "x", "a", "b")
    assert found["difficulty"].tolist() == pytest.approx([2, math.nan, 1, 2], nan_ok=True)
    assert found["samples"].dtype == torch.float64
    assert empty_difficulty_table().aligned(("a",))["samples"].isnan().tolist() == [True]


def test_responses_by_prompt() -> None:
    """Two responses to the first prompt, none to the second, one to the third."""
    responses = ProbeResponses(
        rewards=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        lengths=torch.tensor([4, 5, 6], dtype=torch.int32),
        finish_codes=torch.tensor([0, 1, 0], dtype=torch.int8),
        starts=torch.tensor([0, 2, 2, 3]),
    )
    assert [responses.rewards[responses.of(row)].tolist() for row in range(3)] == [[1, 2], [], [3]]
    assert responses.rows.tolist() == [0, 0, 2]
    assert responses.ended_by("stop").tolist() == [True, False, True]
    assert responses.ended_by("length").tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["responses", "history"])
def test_only_one_table_has_responses_and_history(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^only the table of data\.selection has responses and history: name what"
    ):
        getattr(table(a=1), name)


def test_earlier_estimates_move_with_the_policy() -> None:
    """a and b rose by 1 and 3, so that c, which was not estimated again, is taken to have risen by 2."""
    previous, newer = table(a=1, b=2, c=5), table(a=2, b=5, d=100)
    assert as_dict(moved_with_policy(previous, newer)) == {"a": 3, "b": 4, "c": 7}
    assert as_dict(moved_with_policy(previous, table(d=100))) == {"a": 1, "b": 2, "c": 5}


def test_a_random_share_is_ranked_as_if_all_had_been_estimated() -> None:
    """A policy that gains much between two estimates: without moving, ``Easiest`` would take the fresh ones."""
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(400, generator=generator, dtype=torch.float64)
    ids = tuple(f"p{number}" for number in range(400))
    again = torch.rand(400, generator=generator) < 0.3

    def estimates(rows: Tensor, gain: float) -> StatisticsTable:
        return table(**{ids[row]: float(true[row]) + gain for row in rows.nonzero().flatten().tolist()})

    previous, newer = estimates(torch.ones(400, dtype=torch.bool), 0.0), estimates(again, 1.0)
    for moved, fresh_among_selected in ((True, 0.3), (False, 1.0)):
        merged = (moved_with_policy(previous, newer) if moved else previous).updated(newer).rows(ids)
        easiest = merged["difficulty"].argsort(descending=True)[:100]
        assert float(again[easiest].double().mean()) == pytest.approx(fresh_among_selected, abs=0.1)
