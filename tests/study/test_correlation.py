"""Spearman's correlation against SciPy and by hand, and what its interval holds where many values are equal."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sppo_lightning.study.correlation import Correlation, Ranked, spearman


def ranked(first: np.ndarray, second: np.ndarray) -> Ranked:
    return Ranked([f"p{n}" for n in range(len(first))], first.astype(float), second.astype(float))


def one(first: np.ndarray, second: np.ndarray) -> Correlation:
    found = spearman([ranked(first, second)])
    assert found is not None
    return found


def drawn(generator: np.random.Generator, prompts: int, *, rho: float, tied: float) -> Ranked:
    """Two normal values a prompt, of which the lowest share is made equal."""
    stats = pytest.importorskip("scipy.stats")
    pairs = generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=prompts)
    cut = np.maximum(pairs, stats.norm.ppf(tied)) if tied else pairs
    return ranked(cut[:, 0], cut[:, 1])


def test_by_hand() -> None:
    """Ranks 1 to 10 with two neighbours swapped: 1 - 6 (1² + 1²) / (10 (10² - 1)) = 1 - 12 / 990."""
    first = np.arange(10)
    second = np.array([1, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    assert one(first, second).value == pytest.approx(1 - 12 / 990)
    assert one(first, -second).value == pytest.approx(-(1 - 12 / 990))


@pytest.mark.parametrize("tied", [0.0, 0.5, 0.85])
def test_the_value_is_scipys(tied: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    sample = drawn(np.random.default_rng(1), 60, rho=0.6, tied=tied)
    found = spearman([sample])
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(sample.first, sample.second).statistic)


def test_the_interval_is_about_the_jackknifes() -> None:
    """Leave each prompt out in turn, on the scale of Fisher's z."""
    stats = pytest.importorskip("scipy.stats")
    sample = drawn(np.random.default_rng(2), 80, rho=0.6, tied=0.5)
    left_out = np.arctanh(
        [
            stats.spearmanr(np.delete(sample.first, place), np.delete(sample.second, place)).statistic
            for place in range(80)
        ]
    )
    stderr = math.sqrt(79 / 80 * ((left_out - left_out.mean()) ** 2).sum())
    found = spearman([sample])
    assert found is not None
    width = math.atanh(found.high) - math.atanh(found.low)
    assert width == pytest.approx(2 * stats.t.ppf(0.975, 78) * stderr, rel=0.06)
    assert found.low < found.value < found.high


def test_without_ties_it_is_about_bonett_and_wrights() -> None:
    found = spearman([drawn(np.random.default_rng(3), 2000, rho=0.5, tied=0.0)])
    assert found is not None
    stderr = math.sqrt((1 + found.value**2 / 2) / (2000 - 3))
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * 1.96 * stderr, rel=0.06)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_nineteen_of_twenty_intervals_hold_the_value_where_most_are_tied(rho: float) -> None:
    """Bonett and Wright's held 0.9's in 71 of 100."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(4)
    large = drawn(generator, 100_000, rho=rho, tied=0.85)
    true = stats.spearmanr(large.first, large.second).statistic
    found = [spearman([drawn(generator, 200, rho=rho, tied=0.85)]) for _ in range(200)]
    held = [each.low < true < each.high for each in found if each is not None]
    assert len(held) == 200
    assert np.mean(held) > 0.88


def test_seeds_that_share_prompts_are_not_counted_as_more_prompts() -> None:
    sample = drawn(np.random.default_rng(5), 50, rho=0.5, tied=0.0)
    other = Ranked([f"q{n}" for n in range(50)], sample.first, sample.second)
    alone, again, apart = (spearman(samples) for samples in ([sample], [sample] * 4, [sample, other]))
    assert alone is not None
    assert again is not None
    assert apart is not None
    assert (again.value, again.low, again.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert (again.samples, again.prompts) == (4, 50)
    ratio = (math.atanh(alone.high) - math.atanh(alone.low)) / (
        math.atanh(apart.high) - math.atanh(apart.low)
    )
    assert ratio == pytest.approx(math.sqrt(2), rel=0.03)


def test_what_has_no_correlation() -> None:
    assert spearman([]) is None
    assert spearman([ranked(np.arange(9), np.arange(9))]) is None  # too few
    assert spearman([ranked(np.arange(20), np.zeros(20))]) is None
    same = one(np.arange(20), np.arange(20))
    assert same.value == pytest.approx(1.0)
    assert math.isnan(same.low)
    assert math.isnan(same.high)
