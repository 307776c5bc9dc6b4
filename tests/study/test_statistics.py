"""Paired comparison over crossed seeds and prompts: against values by hand, and against what a simulation does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sppo_lightning.study.statistics import compare, holm, variance_components, variance_of_mean


def crossed(
    seeds: int, prompts: int, *, mean: float, of_seeds: float, of_prompts: float, rest: float, draw: int
) -> np.ndarray:
    """[S, P]: differences with these standard deviations."""
    generator = np.random.default_rng(draw)
    return (
        mean
        + of_seeds * generator.standard_normal((seeds, 1))
        + of_prompts * generator.standard_normal((1, prompts))
        + rest * generator.standard_normal((seeds, prompts))
    )


def test_variance_components_by_hand() -> None:
    """Rows 1, 3 and 5, 11: mean 5; seeds -3, +3; prompts -2, +2; rest +-1.

    Left: 4 * 1 / 1 = 4. Between seeds 2 * 18 / 1 = 36, so (36 - 4) / 2 = 16; prompts 2 * 8 = 16, so (16 - 4) / 2 = 6.
    """
    assert variance_components(np.array([[1.0, 3.0], [5.0, 11.0]])) == pytest.approx((16.0, 6.0, 4.0))


@pytest.mark.parametrize(
    ("seeds", "deviations"),
    [
        (3, (0.0, 0.0, 0.4)),
        (3, (0.02, 0.1, 0.4)),
        (2, (0.1, 0.0, 0.1)),
        (3, (0.1, 0.0, 0.1)),
        (5, (0.1, 0.1, 0.1)),
    ],
)
def test_where_nothing_differs_a_twentieth_of_the_intervals_says_so(
    seeds: int, deviations: tuple[float, float, float]
) -> None:
    """Few seeds, and what varies: the residual alone, all three, seeds above all. A bootstrap has up to 24 % there."""
    of_seeds, of_prompts, rest = deviations
    false = 0
    for draw in range(400):
        settings = {"mean": 0.0, "of_seeds": of_seeds, "of_prompts": of_prompts, "rest": rest}
        found = compare(crossed(seeds, 40, **settings, draw=draw))
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
        false += found.p < 0.05
    assert 0.005 < false / 400 < 0.09


def test_the_variance_of_a_mean_by_hand() -> None:
    """Mean squares 36, 16 and 4 of four values: (36 + 16 - 4) / 4; 48² / (36² / 1 + 16² / 1 + 4² / 1) freedoms."""
    variance, freedom = variance_of_mean(np.array([[1.0, 3.0], [5.0, 11.0]]))
    assert variance == pytest.approx(12.0)
    assert freedom == pytest.approx(48**2 / (36**2 + 16**2 + 4**2))


def test_the_interval_is_as_wide_as_the_crossed_design_says() -> None:
    """Var of the mean: s² / S + p² / P + r² / (S P)."""
    seeds, prompts = 30, 60
    widths = []
    for draw in range(20):
        found = compare(crossed(seeds, prompts, mean=0.2, of_seeds=0.5, of_prompts=1.0, rest=1.0, draw=draw))
        widths.append(found.high - found.low)
    expected = 2 * 1.98 * math.sqrt(0.25 / seeds + 1 / prompts + 1 / (seeds * prompts))
    assert np.mean(widths) == pytest.approx(expected, rel=0.1)


def test_prompts_that_all_seeds_share_are_not_counted_as_many() -> None:
    """Twenty seeds that saw the same twenty prompts know hardly more of prompts than one did."""
    one = np.random.default_rng(3).standard_normal((1, 20))
    found = compare(np.repeat(one, 20, axis=0))
    assert found.high - found.low > 3 * one.std() / math.sqrt(20)


def test_a_clear_difference_and_none() -> None:
    clear = compare(crossed(5, 80, mean=0.5, of_seeds=0.05, of_prompts=0.3, rest=0.3, draw=1))
    assert clear.low > 0
    assert clear.p <= 0.001
    none = compare(crossed(5, 80, mean=0.0, of_seeds=0.05, of_prompts=0.3, rest=0.3, draw=2))
    assert none.low < 0 < none.high
    assert none.p > 0.05
    assert (clear.seeds, clear.prompts) == (5, 80)


def test_swapping_the_arms_changes_the_sign_only() -> None:
    differences = crossed(3, 30, mean=0.1, of_seeds=0.1, of_prompts=0.3, rest=0.3, draw=4)
    ours, theirs = compare(differences), compare(-differences)
    assert ours.mean == pytest.approx(-theirs.mean)
    assert (ours.low, ours.high) == pytest.approx((-theirs.high, -theirs.low))
    assert ours.p == pytest.approx(theirs.p)


def test_one_seed_has_no_interval() -> None:
    found = compare(np.array([[0.1, 0.3, 0.2]]))
    assert found.mean == pytest.approx(0.2)
    assert all(math.isnan(value) for value in (found.low, found.high, found.p))
    assert found.effect == pytest.approx(2.0)


def test_prompts_without_a_reward_in_some_seed_are_left_out() -> None:
    found = compare(np.array([[0.1, np.nan, 0.3], [0.1, 9.0, 0.3]]))
    assert (found.prompts, found.mean) == (2, pytest.approx(0.2))
    assert not math.isnan(found.p)
    assert compare(np.full((2, 3), np.nan)).prompts == 0


def test_seeds_and_prompts_that_would_settle_it() -> None:
    """With d = 0.1 and (1.96 + 0.84)² = 7.85, the variance of the mean may be 0.01 / 7.85 = 0.00127.

    Seeds vary by 0.1: 0.01 / S <= 0.00127 gives 8 seeds, up to the noise of the estimates.
    """
    needed = [
        compare(crossed(40, 400, mean=0.1, of_seeds=0.1, of_prompts=0.1, rest=0.0, draw=draw)).seeds_needed
        for draw in range(5)
    ]
    assert all(each is not None and 5 <= each <= 20 for each in needed)
    hopeless = compare(crossed(3, 8, mean=0.01, of_seeds=1.0, of_prompts=1.0, rest=0.1, draw=0))
    assert (hopeless.seeds_needed, hopeless.prompts_needed) == (None, None)


def test_more_tests_need_more() -> None:
    differences = crossed(4, 40, mean=0.1, of_seeds=0.1, of_prompts=0.1, rest=0.2, draw=1)
    one, many = compare(differences), compare(differences, tests=20)
    assert (one.mean, one.p) == (many.mean, many.p)
    assert one.seeds_needed is not None
    assert many.seeds_needed is None or many.seeds_needed > one.seeds_needed


def test_holm() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan}, tests=3)
    assert [round(found[name], 12) for name in "abc"] == [0.03, 0.06, 0.06]
    assert math.isnan(found["d"])
    assert holm({"a": 0.6, "b": 0.9}, tests=2) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.01}, tests=5) == {"a": 0.05}  # four of them cannot be read yet
