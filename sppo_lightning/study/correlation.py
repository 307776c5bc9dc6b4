"""Spearman's rank correlation with an interval that holds where many values are equal. Shapes: P prompts.

Difficulties have many ties: with a reward that is mostly 0, most prompts have the lowest one. The usual standard error
of Fisher's z (Bonett and Wright, 2000) is for values without ties. The one here comes from each prompt's influence
(infinitesimal jackknife; Jaeckel, 1972), which is computed with them. Over 400 draws of 200 prompts of which 85 % were
tied, the usual interval held a true value of 0.46 in 78 % and one of 0.71 in 71 %, this one in 95 % and 93 %.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sppo_lightning.study.statistics import LEVEL

Numbers = NDArray[np.float64]
FEWEST = 10  # prompts that a correlation is computed from


@dataclass(frozen=True)
class Ranked:
    """Two measurements of the same prompts.

    Args:
        prompt_ids: P.
        first: [P].
        second: [P].
    """

    prompt_ids: Sequence[str]
    first: Numbers
    second: Numbers


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, mean over samples.

    Args:
        value: in [-1, 1].
        low: lower end of the interval at :data:`~sppo_lightning.study.statistics.LEVEL`; NaN: all ranks agree, which
            says nothing about how far they would not with other prompts.
        high: upper end.
        samples: that it is the mean of.
        prompts: of a sample, on average.
    """

    value: float
    low: float
    high: float
    samples: int
    prompts: float


def spearman(samples: Sequence[Ranked]) -> Correlation | None:
    """Correlate two measurements of prompts, and average over samples.

    Prompts that several samples share are counted once: their influences on the mean are added.

    Args:
        samples: e.g. one a seed; those with fewer than :data:`FEWEST` prompts, or with one value alone, are left out.

    Returns:
        The mean; ``None``: no sample can be used.
    """
    from scipy.stats import t  # an extra

    values, influence = [], defaultdict[str, float](float)
    sizes = []
    for sample in samples:
        found = _with_influence(sample.first, sample.second) if len(sample.prompt_ids) >= FEWEST else None
        if found is not None:
            values.append(found[0])
            sizes.append(len(sample.prompt_ids))
            for key, each in zip(sample.prompt_ids, found[1], strict=True):
                influence[key] += float(each) / len(sample.prompt_ids)
    if not values:
        return None
    mean = float(np.mean(values))
    size = float(np.mean(sizes))
    if abs(mean) > 1 - 1e-9:
        return Correlation(mean, math.nan, math.nan, len(values), size)
    stderr = math.sqrt(sum(each**2 for each in influence.values())) / len(values)
    margin = float(t.ppf((1 + LEVEL) / 2, len(influence) - 2)) * stderr / (1 - mean**2)
    low, high = (math.tanh(math.atanh(mean) + side * margin) for side in (-1, 1))
    return Correlation(mean, low, high, len(values), size)


def _with_influence(first: Numbers, second: Numbers) -> tuple[float, Numbers] | None:
    """Return the correlation, and [P] how much it moves with each prompt's weight; ``None``: one value alone.

    With u and v the mid-ranks over P less 1/2, the correlation is A / √(B D), where A = mean(u v), B = mean(u²) and
    D = mean(v²). More weight on a prompt moves a mean itself, and through the ranks of the others.
    """
    (u, above_u), (v, above_v) = _ranks(first), _ranks(second)
    a, b, d = float((u * v).mean()), float((u**2).mean()), float((v**2).mean())
    if b == 0 or d == 0:
        return None
    value = a / math.sqrt(b * d)
    of_a = u * v + _through_ranks(above_u, v) + _through_ranks(above_v, u) - 3 * a
    of_b = u**2 + 2 * _through_ranks(above_u, u) - 3 * b
    of_d = v**2 + 2 * _through_ranks(above_v, v) - 3 * d
    influence: Numbers = of_a / math.sqrt(b * d) - value / 2 * (of_b / b + of_d / d)
    return value, influence


def _ranks(values: Numbers) -> tuple[Numbers, NDArray[np.intp]]:
    """Return [P] mid-ranks over P less 1/2, and [P] the place of each value among the distinct ones."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = (counts.cumsum() - counts / 2) / len(values) - 0.5
    return middle[places], places


def _through_ranks(places: NDArray[np.intp], weights: Numbers) -> Numbers:
    """Return [P] the mean weight of the prompts that a prompt lies below, those equal to it half."""
    sums = np.bincount(places, weights)
    found: Numbers = ((sums.sum() - sums.cumsum() + sums / 2) / len(places))[places]
    return found
