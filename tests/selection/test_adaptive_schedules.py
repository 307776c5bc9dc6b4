"""Schedules that learn from each probe."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.statistics_tables import probe_table, shuffled

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection import (
    AdaptiveTarget,
    AllPrompts,
    CategoryBandit,
    DifficultyPools,
    DisjointSplits,
    MatchedRandomSubset,
    RandomSubset,
    Schedule,
    SkipTied,
)
from sppo_lightning.selection.pool_schedules import middle_ranks
from sppo_lightning.types import UserError

QUICK = settings(max_examples=40, deadline=None)
REWARDS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=1, max_size=4),
    min_size=1,
    max_size=14,
)


def candidates(schedule: Schedule, ids: Sequence[str], iteration: int = 1, *, seed: int = 42) -> list[str]:
    return schedule.candidates(ids, iteration=iteration, iterations=3, seed=seed)


def prompts(ids: Sequence[str], **metadata: Sequence[object]) -> StatisticsTable:
    return StatisticsTable(tuple(ids), {}, read_metadata=lambda name: tuple(metadata[name]))


# --------------------------------------------------------------------------- pools


def test_middle_ranks_golden() -> None:
    """Of 5, 1, 1, 3: two rows of 1 share (0 + 2) / 8, 3 has (2 + 3) / 8, 5 has (3 + 4) / 8."""
    values = torch.tensor([5.0, 1, 1, 3])
    assert middle_ranks(values).tolist() == [7 / 8, 2 / 8, 2 / 8, 5 / 8]
    assert middle_ranks(torch.ones(3)).tolist() == [0.5] * 3


def test_pools_golden() -> None:
    """With weights 0, 1, 0 exactly the middle half stays, and what is not known yet."""
    schedule = DifficultyPools(hard_weight=0.0, easy_weight=0.0)
    ids = [f"p{number}" for number in range(8)]
    assert candidates(schedule, ids) == ids
    schedule.observe(probe_table({name: [number] for number, name in enumerate(ids)}), iteration=0)
    assert schedule.state_dict() == {"hard": ["p0", "p1"], "easy": ["p6", "p7"]}
    assert schedule.metrics() == {"hard": 2, "easy": 2}
    assert candidates(schedule, [*ids, "new"]) == ["p2", "p3", "p4", "p5", "new"]
    assert candidates(schedule, ["p0", "p7"]) == ["p0", "p7"]  # never none
    only_hard = DifficultyPools(hard_weight=1, normal_weight=0, easy_weight=0)
    only_hard.load_state_dict(schedule.state_dict())
    assert candidates(only_hard, ids) == ["p0", "p1"]


def test_prompts_that_tie_are_in_one_pool() -> None:
    """Four of ten at 0 are all hard, as their middle rank is 0.2; ten of ten are normal."""
    rewards = {f"p{number}": [max(0, number - 3)] for number in range(10)}
    schedule = DifficultyPools()
    schedule.observe(probe_table(rewards), iteration=0)
    assert schedule.state_dict()["hard"] == ["p0", "p1", "p2", "p3"]
    schedule.observe(probe_table({name: [1.0] for name in rewards}), iteration=1)
    assert schedule.state_dict() == {"hard": [], "easy": []}


def test_pools_are_drawn_with_their_weights() -> None:
    """Of 200 hard prompts a fifth: 40, standard deviation 5.7; of 400 normal ones all."""
    schedule = DifficultyPools()
    ids = [f"p{number}" for number in range(800)]
    schedule.observe(probe_table({name: [number] for number, name in enumerate(ids)}), iteration=0)
    found = [int(name[1:]) for name in candidates(schedule, ids)]
    assert 20 < sum(number < 200 for number in found) < 60
    assert 20 < sum(number >= 600 for number in found) < 60
    assert sum(200 <= number < 600 for number in found) == 400


# --------------------------------------------------------------------------- tied


def test_tied_probes_are_counted_in_a_row() -> None:
    schedule = SkipTied()
    schedule.observe(probe_table({"a": [1, 1], "b": [0, 1], "c": [2, 2], "d": [5]}), iteration=0)
    assert schedule.state_dict() == {"times": {"a": 1, "c": 1}}  # one response tells nothing
    schedule.observe(probe_table({"a": [1, 1], "b": [1, 1], "c": [2, 1]}, iteration=1), iteration=1)
    assert schedule.state_dict() == {"times": {"a": 2, "b": 1}}
    schedule.observe(probe_table({"a": [1, 1], "b": [0, 1]}, iteration=1), iteration=2)  # nothing new
    assert schedule.state_dict() == {"times": {"a": 2, "b": 1}}
    assert schedule.metrics() == {"tied": 2}


@pytest.mark.parametrize(("times", "skipped"), [(1, 0.5), (2, 0.75), (3, 0.875)])
def test_a_prompt_tied_z_times_is_skipped_with_probability_1_minus_p_to_the_z(
    times: int, skipped: float
) -> None:
    """Of 1,000 prompts; standard deviation at most 16."""
    schedule = SkipTied(explore=0.5, least=0.01)
    ids = [f"p{number}" for number in range(1000)]
    schedule.load_state_dict({"times": dict.fromkeys(ids, times)})
    assert abs(len(candidates(schedule, ids)) - 1000 * (1 - skipped)) < 65


def test_skipping_stops_at_the_least_share_and_spares_what_was_tied_least_often() -> None:
    schedule = SkipTied(explore=0.0, least=0.5)
    schedule.load_state_dict({"times": {"a": 3, "b": 1, "c": 2, "d": 3}})
    assert candidates(schedule, "abcd") == ["b", "c"]
    assert candidates(schedule, "abcdef") == ["b", "e", "f"]
    assert candidates(schedule, ["a"]) == ["a"]
    assert candidates(schedule, []) == []
    assert candidates(SkipTied(explore=0.0), "abcd") == [*"abcd"]


# -------------------------------------------------------------------------- bandit


def test_values_of_categories_golden() -> None:
    """x: rewards 0, 4 and 1, 1: |A| 2, 2, 0, 0: mean 1. y: 0, 0, 3: |A| 1, 1, 2: mean 4/3. d has no advantage."""
    schedule = CategoryBandit(0.5, learning_rate=0.5)
    rewards = {"a": [0, 4], "b": [1, 1], "c": [0, 0, 3], "d": [9]}
    schedule.setup(prompts("abcd", category=[*"xxy", 7]))
    schedule.observe(probe_table(rewards), iteration=0)
    assert schedule.state_dict()["values"] == pytest.approx({"x": 0.5, "y": 2 / 3})
    schedule.observe(probe_table(rewards), iteration=1)
    assert schedule.state_dict()["values"] == pytest.approx({"x": 0.75, "y": 1.0})
    assert schedule.metrics() == pytest.approx({"value/x": 0.75, "value/y": 1.0})


def test_places_go_to_categories_by_softmax() -> None:
    """Q = ln 3 against 0 at τ = 1: ¾ of the places, whatever the sizes. 40 of 4,000 and 1,000: 30, deviation 2.7."""
    schedule = CategoryBandit(40 / 5000)
    ids = [f"p{number}" for number in range(5000)]
    schedule.setup(prompts(ids, category=["x"] * 1000 + ["y"] * 4000))
    schedule.load_state_dict({"values": {"x": math.log(3)}})
    draws = [candidates(schedule, ids, seed=seed) for seed in range(5)]
    assert {len(draw) for draw in draws} == {40}
    share = sum(int(name[1:]) < 1000 for draw in draws for name in draw) / 200
    assert abs(share - 0.75) < 0.12


def test_a_cold_bandit_takes_the_best_category_first() -> None:
    schedule = CategoryBandit(0.5, temperature=1e-3)
    schedule.setup(prompts("abcd", category="xyxy"))
    schedule.load_state_dict({"values": {"x": 1.0, "y": 2.0}})
    assert candidates(schedule, "abcd") == ["b", "d"]


# -------------------------------------------------------------------------- target


def test_target_golden() -> None:
    """T = 5; R̄ = 1.5, β = 0.5, α = 2, η = 3: T = 5 + 3 tanh 2 = 7.892; then R̄ = 0: 5 + 3 (tanh 2 − tanh 1)."""
    schedule = AdaptiveTarget(0.5, start=5.0, step=3.0, target_reward=0.5)
    schedule.setup(prompts("abcd", difficulty=[0, 4, 8, 12]))
    assert candidates(schedule, "abcd") == ["b", "c"]
    schedule.observe(probe_table({"a": [1, 1], "b": [2, 2]}), iteration=0)
    assert schedule.metrics()["target"] == pytest.approx(5 + 3 * math.tanh(2))
    assert candidates(schedule, "abcd") == ["b", "c"]  # distances 7.9, 3.9, 0.1, 4.1
    schedule.observe(probe_table({"a": [0, 0]}, iteration=1), iteration=1)
    assert schedule.metrics()["target"] == pytest.approx(5 + 3 * (math.tanh(2) - math.tanh(1)))
    before = schedule.state_dict()
    schedule.observe(probe_table({"a": [9, 9]}, iteration=1), iteration=2)  # nothing was probed
    assert schedule.state_dict() == before


def test_the_target_stays_among_the_scores() -> None:
    schedule = AdaptiveTarget(0.25, start=5.0, step=100.0, target_reward=0.0)
    schedule.setup(prompts("abcd", difficulty=[1, 4, 8, 12]))
    schedule.observe(probe_table({"a": [9]}), iteration=0)
    assert schedule.metrics() == {"target": 12}
    assert candidates(schedule, "abcd") == ["d"]
    schedule.observe(probe_table({"a": [-9]}), iteration=0)
    assert schedule.metrics() == {"target": 1}


@pytest.mark.parametrize("value", ["hard", True, math.nan])
def test_a_score_has_to_be_a_number(value: object) -> None:
    schedule = AdaptiveTarget(0.5, start=0, step=1, target_reward=0, column="level")
    message = (
        f"needs a number under 'level' of each prompt, but prompt 'b' in data.prompts has {value!r}: correct"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        schedule.setup(prompts("ab", level=[1, value]))


# ---------------------------------------------------------------------- properties

BUILD: list[Callable[[], Schedule]] = [
    DifficultyPools,
    SkipTied,
    lambda: CategoryBandit(0.5),
    lambda: AdaptiveTarget(0.5, start=1.0, step=1.0, target_reward=1.0, column="score"),
    lambda: MatchedRandomSubset(SkipTied(explore=0.1)),
    lambda: MatchedRandomSubset(RandomSubset(0.5)),
]


def told(build: Callable[[], Schedule], rewards: Mapping[str, Sequence[float]], seed: int = 0) -> Schedule:
    schedule = build()
    ids = list(rewards)
    schedule.setup(prompts(ids, category=[name[0] for name in ids], score=[len(name) for name in ids]))
    schedule.observe(shuffled(probe_table(rewards), seed), iteration=0)
    return schedule


@QUICK
@given(st.sampled_from(BUILD), REWARDS, st.integers(0, 99), st.data())
def test_schedules_do_not_see_the_order_of_prompts(
    build: Callable[[], Schedule], rewards: Mapping[str, Sequence[float]], seed: int, data: st.DataObject
) -> None:
    schedule, ids = told(build, rewards), list(rewards)
    found = set(candidates(schedule, ids, seed=seed))
    arranged = data.draw(st.permutations(ids))
    again = told(build, {name: rewards[name] for name in arranged}, seed)
    assert candidates(again, arranged, seed=seed) == [name for name in arranged if name in found]
    assert candidates(schedule, ids, seed=seed) == [name for name in ids if name in found]


@QUICK
@given(st.sampled_from(BUILD), REWARDS, REWARDS, st.integers(0, 99))
def test_a_state_goes_through_json_and_leads_to_the_same(
    build: Callable[[], Schedule],
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    seed: int,
) -> None:
    """As a resumed run does: set up, the state, then the next probe."""
    rewards = {**first, **second}
    ids = list(rewards)
    whole = told(build, rewards)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = told(build, {name: [0.0, 3.0] for name in ids})  # has other ideas before
    resumed.load_state_dict(state)
    assert resumed.state_dict() == whole.state_dict()
    for schedule in (whole, resumed):
        schedule.observe(probe_table(second, iteration=1), iteration=1)
    assert resumed.state_dict() == whole.state_dict()
    assert candidates(resumed, ids, 2, seed=seed) == candidates(whole, ids, 2, seed=seed)


@pytest.mark.parametrize("build", BUILD)
def test_a_question_changes_nothing(build: Callable[[], Schedule]) -> None:
    schedule = told(build, {"a": [0, 0], "b": [1, 3], "c": [3, 3], "d": [0, 1]})
    before = json.dumps(schedule.state_dict())
    for iteration in range(3):
        candidates(schedule, "abcd", iteration)
    assert json.dumps(schedule.state_dict()) == before


@QUICK
@given(st.sampled_from(BUILD[:4]), REWARDS, st.integers(0, 99))
def test_a_matched_control_has_the_size(
    build: Callable[[], Schedule], rewards: Mapping[str, Sequence[float]], seed: int
) -> None:
    ids = list(rewards)
    control = told(lambda: MatchedRandomSubset(build()), rewards)
    found = candidates(control, ids, seed=seed)
    assert len(found) == len(candidates(told(build, rewards), ids, seed=seed))
    assert set(found) <= set(ids)
    assert control.state_dict() == told(build, rewards).state_dict()
    assert control.requires == build().requires


def test_a_control_is_random() -> None:
    ids = [f"p{number}" for number in range(40)]
    control = MatchedRandomSubset(DisjointSplits())
    found = Counter(tuple(candidates(control, ids, number)) for number in range(3))
    assert len(found) == 3
    assert candidates(MatchedRandomSubset(AllPrompts()), ids) == ids


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DifficultyPools(hard=0.8),
            "DifficultyPools(hard=0.8, easy=0.75) must satisfy 0 <= hard <= easy <= 1",
        ),
        (
            lambda: DifficultyPools(easy_weight=2),
            "DifficultyPools.easy_weight=2 must lie in [0, 1]: it is a probability",
        ),
        (lambda: SkipTied(explore=1), "SkipTied.explore=1 must lie in [0, 1)"),
        (lambda: SkipTied(least=0), "SkipTied.least=0 must lie in (0, 1]"),
        (lambda: CategoryBandit(0), "CategoryBandit.fraction=0 must lie in (0, 1]"),
        (
            lambda: CategoryBandit(1, temperature=0),
            "CategoryBandit.temperature=0 must be positive and finite",
        ),
        (lambda: CategoryBandit(1, learning_rate=2), "CategoryBandit.learning_rate=2 must lie in (0, 1]"),
        (
            lambda: AdaptiveTarget(0.5, start=math.inf, step=1, target_reward=0),
            "AdaptiveTarget.start=inf must be finite",
        ),
        (
            lambda: AdaptiveTarget(0.5, start=0, step=0, target_reward=0),
            "AdaptiveTarget.step=0 must be positive and finite",
        ),
    ],
)
def test_bad_arguments(build: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()
