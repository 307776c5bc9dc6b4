"""Learning-rate schedules."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.schedules import Constant, Cosine, LearningRateSchedule, Linear

QUICK = settings(max_examples=50, deadline=None)
CLASSES = [Constant, Linear, Cosine]


def factors(schedule: LearningRateSchedule, steps: int) -> list[float]:
    return [schedule.factor(step, steps) for step in range(steps)]


def test_golden_with_warm_up() -> None:
    """Six steps, a third of them warm-up: 1/3, 2/3, then the peak and a decay over four steps.

    Linear: 1, 3/4, 1/2, 1/4. Cosine, (1 + cos(pi k / 4)) / 2: 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4.
    """
    warm = [1 / 3, 2 / 3]
    assert factors(Constant(1 / 3), 6) == pytest.approx([*warm, 1, 1, 1, 1])
    assert factors(Linear(1 / 3), 6) == pytest.approx([*warm, 1, 0.75, 0.5, 0.25])
    root = math.sqrt(2)
    assert factors(Cosine(1 / 3), 6) == pytest.approx([*warm, 1, (2 + root) / 4, 0.5, (2 - root) / 4])


def test_golden_without_warm_up() -> None:
    assert factors(Constant(), 3) == [1, 1, 1]
    assert factors(Linear(0), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(Cosine(0), 2) == pytest.approx([1, 0.5])


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.1, 10, 1), (0.1, 11, 2), (0.07, 100, 7), (0.07, 200, 14), (0.5, 3, 2)],
)
def test_warm_up_steps_round_up(warmup: float, steps: int, expected: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floating point, and still 7 steps."""
    assert factors(Constant(warmup), steps).index(1.0) == expected


@QUICK
@given(build=st.sampled_from(CLASSES), warmup=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 60))
def test_shape(build: type, warmup: float, steps: int) -> None:
    """It rises to the peak and then falls or stays; every step trains, and none is over the peak."""
    found = factors(build(warmup), steps)
    assert all(0 < value <= 1 for value in found)
    top = found.index(max(found))
    assert all(low < high for low, high in pairwise(found[: top + 1]))
    assert all(high >= low for high, low in pairwise(found[top:]))
    assert math.ceil(warmup * steps) - 1 <= top <= math.ceil(warmup * steps)


@pytest.mark.parametrize("build", CLASSES)
@pytest.mark.parametrize("warmup", [-0.1, 1, 10, float("nan")])
def test_bad_warmup(build: type, warmup: float) -> None:
    message = re.escape(
        f"{build.__name__}.warmup={warmup} must lie in [0, 1): it is a share of an iteration's steps"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(warmup)
