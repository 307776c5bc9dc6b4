"""Win rates and their intervals."""

from __future__ import annotations

import math

import pytest

from sppo_lightning.evaluation.win_rate import reward_preferences, win_rate


def test_by_hand() -> None:
    """Three wins, one loss, two ties of six that are known: (3 + 2/2) / 6."""
    found = win_rate([1, 1, 0.75, 0, 0.5, 0.5, math.nan], seed=0)
    assert found.rate == pytest.approx((1 + 1 + 0.75 + 0.5 + 0.5) / 6)
    assert (found.wins, found.losses, found.ties, found.unknown) == (3, 1, 2, 1)


def test_the_interval_is_that_of_the_mean() -> None:
    """Of 100 verdicts at 1/2, the mean's standard error is 0.05, and 1.96 of these on either side hold 95 %."""
    found = win_rate([0.0, 1.0] * 50, seed=3)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)


def test_the_seed_decides_the_interval() -> None:
    values = [0.1 * number for number in range(10)]
    assert win_rate(values, seed=1, resamples=50) == win_rate(values, seed=1, resamples=50)
    assert win_rate(values, seed=1, resamples=50) != win_rate(values, seed=2, resamples=50)


def test_draws_in_parts_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppo_lightning.evaluation.win_rate.DRAWN_AT_ONCE", 64)
    found = win_rate([0.0, 1.0] * 50, seed=3, resamples=2001)
    assert found.low == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_nothing_to_compare(values: list[float]) -> None:
    found = win_rate(values, seed=0)
    assert math.isnan(found.rate)
    assert math.isnan(found.low)
    assert found.unknown == len(values)


def test_rewards_decide_and_those_that_are_not_finite_do_not() -> None:
    found = reward_preferences([1, 2, 3, None, math.nan, math.inf], [0, 2, 4, 1, 1, 1])
    assert found[:3] == [1.0, 0.5, 0.0]
    assert all(math.isnan(value) for value in found[3:])
