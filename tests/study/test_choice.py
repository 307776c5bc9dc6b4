"""The choice of the best arm: against values by hand, and against what a simulation knows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sppo_lightning.study.choice import Choice, choose, cross_fitted


def gains(
    arms: int = 4,
    seeds: int = 3,
    prompts: int = 40,
    *,
    draw: int = 0,
    of_seeds: float = 0.1,
    of_prompts: float = 0.1,
    means: tuple[float, ...] = (0.0,),
) -> np.ndarray:
    """[A, S, P]: gains of arms whose runs have luck of their own, on prompts that some arms suit better."""
    random = np.random.default_rng(draw)
    return (
        np.broadcast_to(np.array(means), (arms,))[:, None, None]
        + 0.2 * random.standard_normal((1, 1, prompts))
        + of_seeds * random.standard_normal((arms, seeds, 1))
        + of_prompts * random.standard_normal((arms, 1, prompts))
        + 0.2 * random.standard_normal((arms, seeds, prompts))
    )


def chosen(table: np.ndarray, baseline: int | None = None) -> Choice:
    found = choose(table, random=np.random.default_rng(0), baseline=baseline)
    assert found is not None
    return found


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.1, 0.0), (0.0, 0.2), (0.1, 0.1)])
def test_where_arms_are_equal_the_highest_gain_is_too_high_and_the_corrected_one_is_not(
    of_seeds: float, of_prompts: float
) -> None:
    """The true gain is 0. The luck of the winner may lie in its seeds, in its prompts, or in both."""
    found = [
        chosen(gains(draw=draw, of_seeds=of_seeds, of_prompts=of_prompts), baseline=3) for draw in range(120)
    ]
    for values, is_biased in (
        (np.array([each.means[each.best] for each in found]), True),
        (np.array([each.gain.mean for each in found]), False),
        (np.array([each.over_baseline.mean for each in found if each.over_baseline]), False),
    ):
        errors = values.mean() / (values.std() / math.sqrt(len(values)))
        assert errors > 4 if is_biased else abs(errors) < 3
    missed = sum(not each.gain.low <= 0 <= each.gain.high for each in found)
    assert missed <= 12  # of 120, where 6 are expected: one more has a chance of 0.6 %
    claimed = sum(each.over_baseline.p < 0.05 for each in found if each.over_baseline)
    assert claimed <= 12


def test_a_clear_winner() -> None:
    found = chosen(gains(means=(0.0, 0.5, 0.0, 0.1), of_seeds=0.02), baseline=3)
    assert found.best == 1
    assert found.shares.tolist() == [0, 1, 0, 0]
    assert found.close == ()
    assert found.gain.mean == pytest.approx(found.means[1])  # nothing to correct
    assert found.over_baseline is not None
    assert found.over_baseline.low > 0.2
    assert (found.choices, found.prompts) == (20 * 5 * 3, 40)


def test_arms_that_cannot_be_told_apart() -> None:
    found = chosen(gains(means=(0.0, 0.5, 0.5, -0.5), of_seeds=0.02))
    assert set(found.close) == {3 - found.best}
    assert found.over_baseline is None


def test_an_arm_is_measured_with_another_seed_than_it_is_chosen_with() -> None:
    """Arm 0 is good with seed 0 alone, arm 1 with seed 1: each is chosen for the seed that it is bad with."""
    table = np.zeros((2, 2, 10))
    table[0, 0], table[1, 1] = 1.0, 1.0
    found, shares = cross_fitted(table, np.random.default_rng(0))
    assert found == pytest.approx(np.zeros((2, 10)))
    assert shares.tolist() == [0.5, 0.5]


def test_an_arm_is_measured_on_other_prompts_than_it_is_chosen_on() -> None:
    """One seed; arm 1 is better on one prompt of ten alone, and is chosen wherever that one is not measured."""
    table = np.zeros((2, 1, 10))
    table[1, 0, 0] = 1.0
    found, shares = cross_fitted(table, np.random.default_rng(0))
    assert found == pytest.approx(np.zeros((1, 10)))
    assert shares.tolist() == pytest.approx([0.2, 0.8])


def test_one_seed_has_no_interval_and_tells_nothing_apart() -> None:
    found = chosen(gains(seeds=1, means=(0.0, 0.9, 0.0, 0.0)), baseline=0)
    assert found.best == 1
    assert math.isnan(found.gain.low)
    assert math.isnan(found.gain.p)
    assert found.close == (0, 2, 3)


def test_prompts_that_some_run_has_no_reward_for_are_left_out() -> None:
    table = gains(means=(0.0, 0.5, 0.0, 0.0))
    table[2, 1, 7] = np.nan
    found = chosen(table)
    assert found.prompts == 39
    assert not math.isnan(found.gain.low)


def test_nothing_to_choose() -> None:
    random = np.random.default_rng(0)
    assert choose(gains(arms=1), random=random) is None
    assert choose(gains(prompts=4), random=random) is None


def test_arms_without_any_difference() -> None:
    found = chosen(np.zeros((3, 2, 10)), baseline=2)
    assert (found.gain.mean, found.gain.low, found.gain.high, found.gain.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.best == 0
    assert found.close == (1, 2)
