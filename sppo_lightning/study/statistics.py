"""Paired comparison over seeds and held-out prompts. Shapes: S seeds, P prompts.

The prompts are the same for all seeds: seeds and prompts are crossed, both drawn at random. The variance of a mean
comes from the two-way analysis of variance, its degrees of freedom from Satterthwaite (1946). A bootstrap of three
seeds is no substitute: it draws the same three again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """A mean over seeds and prompts.

    Args:
        mean: of the differences.
        low: lower end of the interval at :data:`LEVEL`; NaN with one seed.
        high: upper end.
        p: two-sided; NaN with one seed.
        effect: mean over the standard deviation of the prompts' means (Cohen's d for paired samples); NaN: they do not
            differ.
        seeds: S.
        prompts: P, without those that lack a reward with some seed.
        seeds_needed: for a power of :data:`POWER` at this mean with these prompts; ``None``: more prompts, too.
        prompts_needed: with these seeds; ``None``: more seeds, too.
    """

    mean: float
    low: float
    high: float
    p: float
    effect: float
    seeds: int
    prompts: int
    seeds_needed: int | None
    prompts_needed: int | None


def compare(differences: NDArray[np.float64], *, tests: int = 1) -> Comparison:
    """Compare two arms.

    Args:
        differences: [S, P], of the same seed and prompt; NaN: not known.
        tests: comparisons that the p-value will be corrected for, for what is needed.
    """
    kept = differences[:, np.isfinite(differences).all(axis=0)]
    seeds, prompts = kept.shape
    mean = float(kept.mean()) if prompts else math.nan
    spread = float(kept.mean(axis=0).std(ddof=1)) if prompts > 1 else 0.0
    effect = mean / spread if spread > 0 else math.nan
    if seeds < 2 or prompts < 2:
        return Comparison(mean, math.nan, math.nan, math.nan, effect, seeds, prompts, None, None)
    needed = _needed(kept, (1 - LEVEL) / tests) if mean != 0 else (None, None)
    return Comparison(mean, *interval(mean, *variance_of_mean(kept)), effect, seeds, prompts, *needed)


def interval(mean: float, variance: float, freedom: float) -> tuple[float, float, float]:
    """Return both ends of a mean's interval at :data:`LEVEL`, and its two-sided p.

    Args:
        mean: that was seen.
        variance: of the mean.
        freedom: degrees of freedom of the variance.
    """
    from scipy.stats import t  # an extra

    stderr = math.sqrt(variance)
    margin = float(t.ppf((1 + LEVEL) / 2, freedom)) * stderr
    p = float(2 * t.sf(abs(mean) / stderr, freedom)) if stderr > 0 else float(mean == 0)
    return mean - margin, mean + margin, p


def mean_squares(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean squares of seeds, of prompts, and of what is left, by the two-way analysis of variance.

    Args:
        differences: [S, P], S and P at least 2.
    """
    seeds, prompts = differences.shape
    mean = differences.mean()
    of_seeds = differences.mean(axis=1, keepdims=True) - mean
    of_prompts = differences.mean(axis=0, keepdims=True) - mean
    rest = differences - mean - of_seeds - of_prompts
    return (
        float(prompts * (of_seeds**2).sum() / (seeds - 1)),
        float(seeds * (of_prompts**2).sum() / (prompts - 1)),
        float((rest**2).sum() / ((seeds - 1) * (prompts - 1))),
    )


def variance_components(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the variances between seeds, between prompts, and of what is left; none is below 0.

    Args:
        differences: [S, P], S and P at least 2.
    """
    seeds, prompts = differences.shape
    of_seeds, of_prompts, left = mean_squares(differences)
    return max(0.0, (of_seeds - left) / prompts), max(0.0, (of_prompts - left) / seeds), left


def variance_of_mean(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the variance of the mean over new seeds and prompts, and its degrees of freedom.

    With variances s² between seeds, p² between prompts and r² of what is left: s² / S + p² / P + r² / (S P).

    Args:
        differences: [S, P], S and P at least 2.
    """
    seeds, prompts = differences.shape
    of_seeds, of_prompts, left = mean_squares(differences)
    between_seeds, between_prompts, _ = variance_components(differences)
    terms = [(of_seeds, seeds - 1)] if between_seeds > 0 else []
    terms += [(of_prompts, prompts - 1)] if between_prompts > 0 else []
    if len(terms) != 1:  # it is in both of them, or in none
        terms.append((left if not terms else -left, (seeds - 1) * (prompts - 1)))
    total = sum(square for square, _ in terms)
    weights = sum(square**2 / freedom for square, freedom in terms)
    return total / (seeds * prompts), total**2 / weights if weights > 0 else math.inf


def _needed(differences: NDArray[np.float64], level: float) -> tuple[int | None, int | None]:
    """Return how many seeds, and how many prompts, would show the mean that was seen at a level."""
    seeds, prompts = differences.shape
    of_seeds, of_prompts, left = variance_components(differences)
    normal = NormalDist()
    allowed = (float(differences.mean()) / (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER))) ** 2
    return (
        _enough(of_seeds + left / prompts, allowed - of_prompts / prompts),
        _enough(of_prompts + left / seeds, allowed - of_seeds / seeds),
    )


def _enough(variance: float, allowed: float) -> int | None:
    """Return how many are enough where each adds information of ``1 / variance``."""
    return max(2, math.ceil(variance / allowed)) if allowed > 0 else None


def holm(p_values: Mapping[str, float], *, tests: int) -> dict[str, float]:
    """Return p-values corrected for a number of tests (Holm, 1979); NaN stays NaN.

    Tests that have no p-value yet count as if theirs were the largest.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03}, tests=3)
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    found, largest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (tests - rank)))
        found[name] = largest
    return found


def interval_text(low: float, high: float) -> str:
    """Return an interval as tables show it; nothing where there is none."""
    return "" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
