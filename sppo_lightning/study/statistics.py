"""Paired comparison over seeds and held-out prompts. Shapes: S seeds, P prompts.

The prompts are the same for all seeds, so that seeds and prompts are crossed, not nested: a resample draws seeds and
prompts independently, and each drawn seed sees the same drawn prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """A mean over seeds and prompts.

    Args:
        mean: of the differences.
        low: lower end of the interval at :data:`LEVEL`; NaN with one seed.
        high: upper end.
        p: two-sided, of the bootstrap; NaN with one seed.
        effect: mean over the standard deviation of the prompts' means (Cohen's d for paired samples); NaN: they do not
            differ.
        seeds: S.
        prompts: P.
        seeds_needed: for a power of 0.8 at this effect with these prompts; ``None``: more prompts are needed, too.
        prompts_needed: with these seeds; ``None``: more seeds are needed, too.
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


def compare(differences: NDArray[np.float64], *, seed: int = 0) -> Comparison:
    """Compare two arms.

    Args:
        differences: [S, P], of the same seed and prompt; NaN: not known.
        seed: of the bootstrap.
    """
    kept = differences[:, np.isfinite(differences).all(axis=0)]
    seeds, prompts = kept.shape
    mean = float(kept.mean()) if prompts else math.nan
    if prompts == 0 or (seeds == 1 and prompts < 2):
        return Comparison(mean, math.nan, math.nan, math.nan, math.nan, seeds, prompts, None, None)
    spread = float(kept.mean(axis=0).std(ddof=1)) if prompts > 1 else 0.0
    effect = mean / spread if spread > 0 else math.nan
    if seeds == 1:
        return Comparison(mean, math.nan, math.nan, math.nan, effect, seeds, prompts, None, None)
    means = _resampled(kept, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(float(np.mean(means <= 0)), float(np.mean(means >= 0)))
    p = min(1.0, 2 * max(tail, 1 / RESAMPLES))
    return Comparison(
        mean,
        float(low),
        float(high),
        p,
        effect,
        seeds,
        prompts,
        *_needed(kept) if mean != 0 else (None, None),
    )


def _resampled(differences: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """[RESAMPLES]: means of resamples of seeds and prompts."""
    seeds, prompts = differences.shape
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_prompts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
    found: NDArray[np.float64] = ((of_seeds @ differences) * of_prompts).sum(axis=1)
    return found


def variance_components(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the variances between seeds, between prompts, and of what is left, by the two-way analysis of variance.

    Args:
        differences: [S, P], S and P at least 2.
    """
    seeds, prompts = differences.shape
    mean = differences.mean()
    of_seeds = differences.mean(axis=1, keepdims=True) - mean
    of_prompts = differences.mean(axis=0, keepdims=True) - mean
    rest = differences - mean - of_seeds - of_prompts
    left = float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))
    between_seeds = float(prompts * (of_seeds**2).sum() / (seeds - 1))
    between_prompts = float(seeds * (of_prompts**2).sum() / (prompts - 1))
    return max(0.0, (between_seeds - left) / prompts), max(0.0, (between_prompts - left) / seeds), left


def _needed(differences: NDArray[np.float64], power: float = 0.8) -> tuple[int | None, int | None]:
    """Return how many seeds, and how many prompts, would show the mean that was seen."""
    seeds, prompts = differences.shape
    if prompts < 2:
        return None, None
    of_seeds, of_prompts, left = variance_components(differences)
    normal = NormalDist()
    allowed = (float(differences.mean()) / (normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(power))) ** 2
    return (
        _enough(of_seeds + left / prompts, allowed - of_prompts / prompts),
        _enough(of_prompts + left / seeds, allowed - of_seeds / seeds),
    )


def _enough(variance: float, allowed: float) -> int | None:
    """Return how many are enough where each adds information of ``1 / variance``."""
    return max(2, math.ceil(variance / allowed)) if allowed > 0 else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number (Holm, 1979); NaN stays NaN, and is not counted.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    found, largest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        found[name] = largest
    return found
