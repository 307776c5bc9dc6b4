"""Learning-rate schedules: pure functions of (step in the iteration, steps of the iteration).

Each iteration starts anew, so that its rate does not depend on how many pairs other iterations gave.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class LearningRateSchedule(ABC):
    """The share of the peak learning rate at each optimizer step; chosen by ``class_path``."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Return the factor in [0, 1] at ``step`` (from 0) of ``steps``."""


def _checked_warmup(owner: str, warmup: float) -> float:
    if not 0 <= warmup < 1:
        raise ValueError(f"{owner}.warmup={warmup} must lie in [0, 1): it is a share of an iteration's steps")
    return warmup


def _after_warmup(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """Return (warm-up factor, progress of the decay in [0, 1))."""
    warm = math.ceil(warmup * steps - 1e-9)  # 0.07 * 100 = 7.000000000000001
    if step < warm:
        return (step + 1) / (warm + 1), 0.0
    return 1.0, (step - warm) / (steps - warm)


class Constant(LearningRateSchedule):
    """Linear warm-up, then the peak rate.

    Args:
        warmup: share of the iteration's steps, in [0, 1).
    """

    def __init__(self, warmup: float = 0.0) -> None:
        self.warmup = _checked_warmup("Constant", warmup)

    def factor(self, step: int, steps: int) -> float:
        """Return the warm-up factor, then 1."""
        return _after_warmup(step, steps, self.warmup)[0]


class Linear(LearningRateSchedule):
    """Linear warm-up, then linear decay towards 0.

    Args:
        warmup: share of the iteration's steps, in [0, 1).
    """

    def __init__(self, warmup: float = 0.1) -> None:
        self.warmup = _checked_warmup("Linear", warmup)

    def factor(self, step: int, steps: int) -> float:
        """Return warm-up times what is left of the decay."""
        warm, progress = _after_warmup(step, steps, self.warmup)
        return warm * (1 - progress)


class Cosine(LearningRateSchedule):
    """Linear warm-up, then a half cosine towards 0.

    Args:
        warmup: share of the iteration's steps, in [0, 1).
    """

    def __init__(self, warmup: float = 0.1) -> None:
        self.warmup = _checked_warmup("Cosine", warmup)

    def factor(self, step: int, steps: int) -> float:
        """Return warm-up times the half cosine."""
        warm, progress = _after_warmup(step, steps, self.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))
