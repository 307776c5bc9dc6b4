"""Means with their standard errors, as the report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.evaluation.measures import PairedDifference, mean_with_error

INTERVAL = 1.96
"""Standard errors to either side of a mean: 95 % of a normal distribution."""


class Estimate(NamedTuple):
    """A mean; NaN where there is nothing to take it of."""

    mean: float
    stderr: float  # NaN below two values
    size: int  # values that it is the mean of

    @classmethod
    def of(cls, values: Tensor | Iterable[float]) -> Estimate:
        """Return the mean of the finite values."""
        tensor = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
        mean, stderr, size = mean_with_error(tensor).tolist()
        return cls(mean, stderr, int(size))

    @classmethod
    def of_difference(cls, difference: PairedDifference) -> Estimate:
        """Return a paired difference as an estimate."""
        return cls(*difference)
