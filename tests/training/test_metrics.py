"""Metrics of held-out evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppo_lightning.evaluation.metrics import MeanWithError, mean_with_error

NAN, INF = float("nan"), float("inf")


def measured(*batches: list[float]) -> list[float]:
    metric = MeanWithError()
    for batch in batches:
        metric.update(torch.tensor(batch))
    found = metric.compute()
    assert found.shape == (3,)
    assert found.dtype == torch.float64
    return found.tolist()


def test_mean_with_error_golden() -> None:
    """1, 2, 3, 4: mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3, error sqrt(5/3 / 4)."""
    assert measured([1, 2, 3, 4]) == pytest.approx([2.5, math.sqrt(5 / 12), 4])


def test_the_metric_is_the_function_of_all_updates() -> None:
    values = torch.tensor([0.25, NAN, -3.0, 8.0])
    assert mean_with_error(values).tolist() == measured([0.25], [NAN, -3.0], [8.0])


def test_non_finite_values_are_left_out() -> None:
    assert measured([1, NAN, 2], [INF], [3, -INF, 4]) == pytest.approx([2.5, math.sqrt(5 / 12), 4])


def test_one_value_has_no_error_and_no_value_has_no_mean() -> None:
    assert measured([7, NAN]) == pytest.approx([7, NAN, 1], nan_ok=True)
    assert measured([NAN], []) == pytest.approx([NAN, NAN, 0], nan_ok=True)


def test_values_of_any_shape() -> None:
    metric = MeanWithError()
    metric.update(torch.tensor([[1.0, 2], [3, 4]]))
    metric.update(torch.tensor(5.0))
    assert metric.compute().tolist() == pytest.approx([3, math.sqrt(2.5 / 5), 5])


def test_sums_are_float64() -> None:
    """In float32 the sum of these three would be a multiple of 4, and the mean off by a third."""
    assert measured([2**24, 2**24 + 2, 2**24 + 4])[:2] == pytest.approx(
        [2**24 + 2, 2 / math.sqrt(3)], rel=1e-12
    )
    assert measured([2**24, 2**24, 2**24 + 2])[0] == pytest.approx(2**24 + 2 / 3, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=8), data=st.data())
def test_batches_do_not_matter(values: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    assert measured(values[:cut], values[cut:]) == pytest.approx(measured(values), rel=1e-9, abs=1e-12)


def test_reset() -> None:
    metric = MeanWithError()
    metric.update(torch.tensor([100.0]))
    metric.reset()
    metric.update(torch.tensor([1.0, 3]))
    assert metric.compute().tolist() == pytest.approx([2, 1, 2])


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("batches", [[], [[NAN]], [[1.0, NAN], [2.0]]])
def test_ranks_are_joined_also_one_without_values(batches: list[list[float]]) -> None:
    """The other rank has 3 and 4; what is left here afterwards is this rank's own again."""

    def gather(tensor: Tensor, group: object = None) -> list[Tensor]:
        return [tensor, torch.tensor([3.0, 4.0])]

    metric = MeanWithError()
    metric.dist_sync_fn = gather
    metric.distributed_available_fn = lambda: True
    for batch in batches:
        metric.update(torch.tensor(batch))
    mine = [value for batch in batches for value in batch if math.isfinite(value)]
    assert metric.compute().tolist() == pytest.approx(measured([*mine, 3, 4]))
    metric.distributed_available_fn = lambda: False
    metric.update(torch.tensor([9.0]))
    assert metric.compute().tolist() == pytest.approx(measured([*mine, 9]), nan_ok=True)
