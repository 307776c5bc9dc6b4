"""Tests of distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square(drawn: Tensor, probs: Tensor) -> float:
    """Return Pearson's statistic over its critical value: an honest sampler exceeds 1 once in 10,000 times.

    Tokens expected under five times are counted together; a token of probability 0 makes it infinite. The
    critical value is the Wilson-Hilferty approximation, ``df (1 - 2/(9 df) + 3.719 sqrt(2/(9 df)))^3``.
    """
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    expected = probs.double() * len(drawn)
    if bool((counts[expected == 0] > 0).any()):
        return math.inf
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (len(counts) - 1))
    return statistic / ((len(counts) - 1) * (1 - spread + 3.719 * math.sqrt(spread)) ** 3)
