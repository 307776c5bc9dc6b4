"""Counts of an iteration's responses."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.iteration.counters import ResponseCounters
from sppo_lightning.types import Rollout

REASONS = ["too_long_to_score", "failed_score", "server_error", "unfinished"]


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Whatever a store may hold: rewards of every kind, reasons with or without a reward."""
    return Rollout(
        prompt_id="p",
        sample_index=0,
        prompt="",
        response="",
        token_ids=tuple(range(draw(st.integers(0, 5)))),
        finish_reason=draw(st.sampled_from(["stop", "length", "failed"])),
        reward=draw(st.none() | st.floats(width=32)),
        reward_parts=draw(st.dictionaries(st.sampled_from(["a", "b"]), st.floats(-9, 9))),
        drop_reason=draw(st.none() | st.sampled_from(REASONS)),
    )


def counters_of(*groups: list[Rollout]) -> ResponseCounters:
    counters = ResponseCounters()
    for rows in groups:
        counters.add(rows)
    return counters


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(rollouts(), max_size=4), max_size=4))
def test_in_is_out_and_dropped(groups: list[list[Rollout]]) -> None:
    rows = [row for group in groups for row in group]
    counts = counters_of(*groups).counts()
    assert counts["sampled"] == len(rows) == counts["usable"] + sum(counts["dropped"].values())
    assert counts["usable"] == sum(row.usable for row in rows)
    named = Counter(row.drop_reason for row in rows if row.drop_reason is not None)
    silent = [row for row in rows if row.drop_reason is None and not row.usable]
    assert counts["dropped"] == named + Counter(non_finite_reward=len(silent))


def test_parts_without_a_number_are_left_out() -> None:
    """Of ``a`` 1 and 3 count; ``b`` is never a number."""
    parts = [{"a": 1.0, "b": math.nan}, {"a": math.inf}, {"a": 3.0}]
    rows = [Rollout("p", n, "", "", (5,), "stop", 1.0, part) for n, part in enumerate(parts)]
    found = {name: value for name, value in counters_of(rows).metrics().items() if "/parts/" in name}
    assert found == {"iteration/reward/parts/a": 2.0}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(rollouts(), min_size=1, max_size=4), min_size=2, max_size=4), st.randoms())
def test_the_order_of_prompts_changes_nothing(groups: list[list[Rollout]], random: object) -> None:
    answered = [[row] for group in groups for row in group if row.usable and row.finish_reason != "failed"]
    if answered:
        assert counters_of(*answered).metrics() == pytest.approx(
            counters_of(*answered[::-1]).metrics(), rel=1e-6
        )


def row(tokens: int, reward: float | None, **fields: object) -> Rollout:
    settings = {"finish_reason": "stop", **fields}
    return Rollout("p", 0, "", "", tuple(range(tokens)), reward=reward, **settings)  # type: ignore[arg-type]


GROUPS = [
    [
        row(4, 1.0, reward_parts={"style": 1.0}),
        row(10, 3.0, finish_reason="length", reward_parts={"style": 2.0, "unfinished_penalty": -0.5}),
        row(0, math.nan, finish_reason="failed", drop_reason="server_error"),
    ],
    [
        row(2, 6.0, reward_parts={"style": 6.0}),
        row(8, math.nan, reward_parts={"style": 90.0}),
        row(6, 50.0, finish_reason="length", drop_reason="unfinished"),
    ],
    [row(6, math.nan, drop_reason="failed_score")],
]


def test_counts_by_hand() -> None:
    assert counters_of(*GROUPS).counts() == {
        "sampled": 7,
        "usable": 3,
        "dropped": {"server_error": 1, "non_finite_reward": 1, "unfinished": 1, "failed_score": 1},
    }


def test_metrics_by_hand() -> None:
    """Of prompts with usable responses the means are 2 and 6; six responses of 4, 10, 2, 8, 6 and 6 tokens came
    back, two of them cut; the usable ones have styles of 1 and 2, and 6, and one has a penalty. Of 4 + 10 and of
    2 + 8 + 6 tokens 10 and 8 are distinct, of 3 + 9 and 1 + 7 + 5 bigrams 9 and 7. Rewards of 1 and 3: sqrt(2)."""
    assert counters_of(*GROUPS).metrics() == {
        "iteration/diversity/distinct_1": pytest.approx((10 / 14 + 8 / 16) / 2),
        "iteration/diversity/distinct_2": pytest.approx((9 / 12 + 7 / 13) / 2),
        "iteration/responses_identical/share": 0.0,
        "iteration/first_token/entropy": 0.0,
        "iteration/reward/spread": pytest.approx(math.sqrt(2)),
        "iteration/reward/tied_share": 0.0,
        "iteration/reward/mean": 4.0,
        "iteration/response_length/mean": 6.0,
        "iteration/response_unfinished/share": pytest.approx(1 / 3),
        "iteration/reward/parts/style": 3.75,  # the mean of two prompts' means, as of the reward
        "iteration/reward/parts/unfinished_penalty": -0.5,
        "iteration/responses_dropped/server_error": 1.0,
        "iteration/responses_dropped/non_finite_reward": 1.0,
        "iteration/responses_dropped/unfinished": 1.0,
        "iteration/responses_dropped/failed_score": 1.0,
    }


def test_samples_that_only_selected_prompts_have_count_in_no_mean() -> None:
    """They are there because the first ones were good, which would move the mean towards the selection."""
    counters = ResponseCounters()
    rows = [
        replace(row(3, reward, reward_parts={"style": reward}), sample_index=index)
        for index, reward in enumerate((4.0, 1.0))
    ]
    counters.add(rows, probed=range(1))
    counters.add(rows[:1], probed=range(1))
    found = counters.metrics()
    assert (found["iteration/reward/mean"], found["iteration/reward/parts/style"]) == (4.0, 4.0)
    assert counters.counts() == {"sampled": 3, "usable": 3, "dropped": {}}


def test_nothing_dropped_is_nothing_logged() -> None:
    found = counters_of([row(3, 1.5)]).metrics()
    assert found == {
        "iteration/first_token/entropy": 0.0,
        "iteration/reward/mean": 1.5,
        "iteration/response_length/mean": 3.0,
        "iteration/response_unfinished/share": 0.0,
    }


def test_nothing_added_is_nothing_counted() -> None:
    assert counters_of().counts() == {"sampled": 0, "usable": 0, "dropped": {}}
