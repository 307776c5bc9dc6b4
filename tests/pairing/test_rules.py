"""Pairing rules: values by hand, and what holds of each whatever the rewards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.pairing import (
    BestMinimumOf,
    BestNearest,
    BestRandom,
    BestWorst,
    Choice,
    LengthPenalizedBestWorst,
    MarginThreshold,
    MatchedRandomPairs,
    Pairing,
    RandomPairs,
    Responses,
    TopPairs,
)
from sppo_lightning.types import Rollout

QUICK = settings(max_examples=50, deadline=None)
REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]) | st.floats(-5, 5), min_size=2, max_size=7).filter(
    lambda rewards: len(set(rewards)) > 1
)


def responses(rewards: Sequence[float], lengths: Sequence[int] | None = None) -> Responses:
    rows = [
        Rollout("p", index, "Q", "a" * index, (1,) * length, "stop", reward)
        for index, (reward, length) in enumerate(zip(rewards, lengths or [1] * len(rewards), strict=True))
    ]
    return Responses(rows, torch.tensor(rewards, dtype=torch.float64))


def chosen(
    rule: Pairing, rewards: Sequence[float], lengths: Sequence[int] | None = None, *, seed: int = 0
) -> list[tuple[int, int]]:
    found = rule.pairs(responses(rewards, lengths), torch.Generator().manual_seed(seed))
    assert all(isinstance(choice, Choice) for choice in found)
    return [tuple(choice) for choice in found]


# ------------------------------------------------------------------- golden values


@pytest.mark.parametrize(("k", "rejected"), [(0, 3), (0.5, 2), (1, 0), (2, 0), (-9, 4)])
def test_nearest_golden(k: float, rejected: int) -> None:
    """Rewards -4, -4, -2, 0, 4, 6: μ = 0, σ = √(88 / 6) = 3.83; targets 0, -1.9, -3.8, -7.7 and far above."""
    assert chosen(BestNearest(k), [-4, -4, -2, 0, 4, 6]) == [(5, rejected)]


def test_nearest_is_not_the_lowest() -> None:
    """Rewards 0 (18 times), -3, -20, 3, 20: μ = 0, σ = √(818 / 22) = 6.1; μ - σ is nearest to -3, μ - 3σ to -20."""
    rewards = [0.0] * 18 + [-3.0, -20.0, 3.0, 20.0]
    assert chosen(BestNearest(1.0), rewards) == [(21, 18)]
    assert chosen(BestNearest(3.0), rewards) == [(21, 19)]
    assert chosen(BestNearest(), rewards) == chosen(BestNearest(2.0), rewards) == [(21, 19)]


def test_minimum_of_golden() -> None:
    rewards = [1, 0.5, 3, -2, 2]
    assert chosen(BestMinimumOf(1), rewards) == [(2, 0)]
    assert chosen(BestMinimumOf(3), rewards) == [(2, 1)]
    assert chosen(BestMinimumOf(4), rewards) == [(2, 3)]
    assert chosen(BestMinimumOf(9), rewards) == [(2, 3)]


def test_length_penalty_golden() -> None:
    """Rewards 3, 2, 1 of 20, 5, 1 tokens: less 0.1 a token 1, 1.5, 0.9."""
    assert chosen(LengthPenalizedBestWorst(0.1), [3, 2, 1], [20, 5, 1]) == [(1, 2)]
    assert chosen(LengthPenalizedBestWorst(0.2), [3, 2, 1], [20, 5, 1]) == [(1, 0)]
    assert chosen(LengthPenalizedBestWorst(1), [3, 2], [3, 2]) == []


def test_top_pairs_golden() -> None:
    """Rewards 0, 3, 1: gaps 3 (1, 0), 2 (1, 2), 1 (2, 0)."""
    assert chosen(TopPairs(1), [0, 3, 1]) == [(1, 0)]
    assert chosen(TopPairs(2), [0, 3, 1]) == [(1, 0), (1, 2)]
    assert chosen(TopPairs(9), [0, 3, 1]) == [(1, 0), (1, 2), (2, 0)]
    assert chosen(TopPairs(3), [0, 3, 0, 3]) == [(1, 0), (1, 2), (3, 0)]


def test_thresholds_golden() -> None:
    pairs = TopPairs(9)
    assert chosen(MarginThreshold(pairs, 2), [0, 3, 1]) == [(1, 0), (1, 2)]
    assert chosen(MarginThreshold(pairs, 1, 2), [0, 3, 1]) == [(1, 2), (2, 0)]
    assert chosen(MarginThreshold(pairs, max_gap=1), [0, 3, 1]) == [(2, 0)]
    assert chosen(MarginThreshold(BestWorst(), 4), [0, 3, 1]) == []
    shorter = LengthPenalizedBestWorst(1)
    assert chosen(shorter, [0, 1], [1, 9]) == [(0, 1)]
    assert chosen(MarginThreshold(shorter), [0, 1], [1, 9]) == []  # a gap of -1


def test_random_pairs_are_drawn_evenly() -> None:
    """Of 600 draws each of 5 pairs gets 120, standard deviation 9.8; the tied responses are none."""
    generator = torch.Generator().manual_seed(0)
    given_ = responses([0, 1, 1, 2])
    counts = Counter(RandomPairs().pairs(given_, generator)[0] for _ in range(600))
    assert set(counts) == {(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)}
    assert all(80 < count < 160 for count in counts.values())


# ---------------------------------------------------------------------- properties

RULES: list[Pairing] = [
    BestWorst(),
    BestRandom(),
    BestNearest(2.0),
    BestNearest(-0.5),
    BestMinimumOf(2),
    LengthPenalizedBestWorst(0.1),
    MarginThreshold(TopPairs(4), 0.5, 2.0),
    TopPairs(3),
    RandomPairs(3),
    MatchedRandomPairs(MarginThreshold(TopPairs(4), 0.5, 2.0)),
]


@QUICK
@given(st.sampled_from(RULES), REWARDS, st.integers(0, 9))
def test_choices_are_sound_and_repeatable(rule: Pairing, rewards: list[float], seed: int) -> None:
    lengths = [1 + number * 7 % 5 for number in range(len(rewards))]
    found = chosen(rule, rewards, lengths, seed=seed)
    assert len(set(found)) == len(found) <= rule.most_pairs
    assert chosen(rule, rewards, lengths, seed=seed) == found
    assert all(0 <= row < len(rewards) for pair in found for row in pair)
    if not isinstance(rule, LengthPenalizedBestWorst | BestMinimumOf):
        assert all(rewards[better] > rewards[worse] for better, worse in found)


@QUICK
@given(
    st.sampled_from([BestNearest(2.0), TopPairs(4), BestMinimumOf(3), LengthPenalizedBestWorst(0.25)]),
    REWARDS,
    st.sampled_from([-8.0, 0.5, 4.0]),
)
def test_a_constant_on_all_rewards_changes_nothing(
    rule: Pairing, rewards: list[float], constant: float
) -> None:
    """With rewards in quarters, so that adding rounds nothing."""
    quarters = [round(4 * reward) / 4 for reward in rewards]
    if len(set(quarters)) > 1:
        moved = [reward + constant for reward in quarters]
        if isinstance(rule, BestNearest):  # a target halfway between two responses may round either way
            better, worse = chosen(rule, quarters)[0]
            assert chosen(rule, moved)[0][0] == better
            assert quarters[worse] < quarters[better]
        else:
            assert chosen(rule, moved) == chosen(rule, quarters)


@QUICK
@given(REWARDS, st.integers(1, 5))
def test_one_top_pair_is_best_worst_and_more_extend_fewer(rewards: list[float], most: int) -> None:
    rewards = [round(reward, 6) for reward in rewards]  # differences that a subtraction does not lose
    if len(set(rewards)) == 1:
        return
    assert chosen(TopPairs(1), rewards) == chosen(BestWorst(), rewards)
    more = chosen(TopPairs(most + 1), rewards)
    assert more[:most] == chosen(TopPairs(most), rewards)
    gaps = [rewards[better] - rewards[worse] for better, worse in more]
    assert gaps == sorted(gaps, reverse=True)


@QUICK
@given(REWARDS)
def test_many_deviations_below_is_the_lowest(rewards: list[float]) -> None:
    values = [round(reward, 2) for reward in rewards]
    if len(set(values)) > 1:
        assert chosen(BestNearest(50.0), values) == chosen(BestWorst(), values)
        assert chosen(BestMinimumOf(len(values)), values) == chosen(BestWorst(), values)


@QUICK
@given(st.sampled_from(RULES), REWARDS, st.integers(0, 9))
def test_a_matched_control_gives_as_many_pairs(rule: Pairing, rewards: list[float], seed: int) -> None:
    control = MatchedRandomPairs(rule)
    assert control.most_pairs == rule.most_pairs
    assert len(chosen(control, rewards, seed=seed)) == len(chosen(rule, rewards, seed=seed))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BestNearest(float("nan")), "BestNearest.k=nan must be finite"),
        (lambda: BestMinimumOf(0), "BestMinimumOf.m=0 must be at least 1"),
        (
            lambda: LengthPenalizedBestWorst(0),
            "LengthPenalizedBestWorst.per_token=0 must be positive and finite",
        ),
        (lambda: TopPairs(0), "TopPairs.most_pairs=0 must be at least 1"),
        (lambda: RandomPairs(-1), "RandomPairs.most_pairs=-1 must be at least 1"),
        (
            lambda: MarginThreshold(BestWorst(), 2, 1),
            "MarginThreshold(min_gap=2, max_gap=1) must satisfy min_gap <= max_gap",
        ),
    ],
)
def test_bad_arguments(build: Callable[[], Pairing], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()
