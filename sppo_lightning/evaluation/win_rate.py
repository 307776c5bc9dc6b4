"""Win rates: how often one set of answers beats another, prompt by prompt.

A preference is the probability that an answer beats the other one to the same prompt, in [0, 1]: 1 won, 0 lost, 0.5
tied, NaN not known. AlpacaEval's files have 1 more, from 1 to 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

TIE = 0.5
COVERAGE = 0.95  # of an interval
RESAMPLES = 10_000
DRAWN_AT_ONCE = 2**22  # prompts drawn at once


class WinRate(NamedTuple):
    """How often answers beat others; prompts without a preference are left out."""

    rate: float  # mean preference, in [0, 1]; NaN without a prompt
    low: float  # bounds of the bootstrap interval over prompts, :data:`COVERAGE` wide
    high: float
    wins: int
    losses: int
    ties: int
    unknown: int  # prompts without a preference


def win_rate(preferences: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> WinRate:
    """Return the mean preference with the percentile bootstrap's interval over prompts.

    A prompt is drawn with both of its answers, so that the comparison stays paired.

    Args:
        preferences: one a prompt; more than 0.5 is a win.
        seed: decides the draws.
        resamples: bootstrap samples.
    """
    values = torch.tensor(list(preferences), dtype=torch.float64)
    known = values[~values.isnan()]
    low, high = (
        _bootstrap_interval(known, seed=seed, resamples=resamples) if len(known) else (math.nan, math.nan)
    )
    return WinRate(
        rate=float(known.mean()) if len(known) else math.nan,
        low=low,
        high=high,
        wins=int((known > TIE).sum()),
        losses=int((known < TIE).sum()),
        ties=int((known == TIE).sum()),
        unknown=len(values) - len(known),
    )


def _bootstrap_interval(values: torch.Tensor, *, seed: int, resamples: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    at_once = max(1, DRAWN_AT_ONCE // count)
    means = [
        values[torch.randint(count, (min(at_once, resamples - start), count), generator=generator)].mean(1)
        for start in range(0, resamples, at_once)
    ]
    tail = (1 - COVERAGE) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def reward_preferences(rewards: Sequence[float | None], others: Sequence[float | None]) -> list[float]:
    """Return what rewards say of answers against others: 1 above, 0.5 equal, 0 below, NaN where one is not finite."""
    return [_preference(reward, other) for reward, other in zip(rewards, others, strict=True)]


def _preference(reward: float | None, other: float | None) -> float:
    if reward is None or other is None or not (math.isfinite(reward) and math.isfinite(other)):
        return math.nan
    return 1.0 if reward > other else TIE if reward == other else 0.0
