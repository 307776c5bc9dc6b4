"""How far two computations of the same log-probs may lie apart."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sppo_lightning.policy.agreement import (
    TOLERANCES,
    Agreement,
    coarsest,
    compare_logits,
    compare_logps,
    compare_stored_sums,
    product_dtype,
)
from sppo_lightning.policy.rounding import off_by_a_rounding


def test_an_agreement_and_its_words() -> None:
    found = Agreement(0.5, 0.25)
    assert not found.holds
    assert str(found) == "0.5 nat per token (tolerance 0.25)"
    assert found.allowing(0.5).holds
    assert found.allowing(0.1) == found
    assert not Agreement(math.nan, 1.0).holds


@pytest.mark.parametrize(
    ("dtype", "best", "tolerance"),
    [
        (torch.float64, 4.0, 1e-9),
        (torch.float32, 4.0, 1e-4),
        (torch.bfloat16, 4.0, 2.0**-8 * 4),
        (torch.bfloat16, -4.0, 2.0**-8 * 4),
        (torch.bfloat16, 0.1, 1e-3),
        (torch.float16, 4.0, 2.0**-11 * 4),
    ],
)
def test_roundings_of_logits_are_allowed(dtype: torch.dtype, best: float, tolerance: float) -> None:
    """|1 - 0|, |2 - 4| make 1.5 on average; half a spacing of the dtype at the largest logit."""
    one, other = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()
    found = compare_logps(one, other, best_logits=torch.tensor([best, best]).double(), dtype=dtype)
    assert found == pytest.approx((1.5, tolerance))


def test_log_probs_are_no_more_exact_than_they_are_held() -> None:
    """In float32, though the products were of float64."""
    one = torch.zeros(2)
    found = compare_logps(one, one + 5e-5, best_logits=one, dtype=torch.float64)
    assert found.tolerance == TOLERANCES[torch.float32].least
    assert found.holds


def test_logits_are_compared_by_what_is_most_likely() -> None:
    """log(3/4) against log(1/2); a constant that all logits share is no difference."""
    own, other = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[7.0, 7.0]])
    found = compare_logits(own, other, dtype=torch.bfloat16)
    assert found.drift == pytest.approx(math.log(1.5), rel=1e-6)
    assert found.tolerance == pytest.approx(2.0**-8 * math.log(3.0))
    assert compare_logits(own, own + 5.0, dtype=torch.float32).holds
    assert not compare_logits(own, torch.tensor([[math.nan, 0.0]]), dtype=torch.bfloat16).holds


def test_sums_are_compared_by_the_token() -> None:
    """|3 - 0| + |-1 - 1| over 10 tokens."""
    found = compare_stored_sums(
        torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0]), tokens=10, dtype=torch.bfloat16
    )
    assert found == pytest.approx((0.5, 0.05))


def test_coarser_dtypes_are_never_stricter() -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for finer, coarser in pairwise(dtypes):
        assert coarsest(coarser, finer) == coarser
        assert all(a <= b for a, b in zip(TOLERANCES[finer], TOLERANCES[coarser], strict=True))


def layer(dtype: torch.dtype = torch.float32, **quantization: Any) -> nn.Module:
    model = nn.Linear(2, 2).to(dtype)
    settings = SimpleNamespace(**quantization) if quantization else None
    model.config = SimpleNamespace(quantization_config=settings)  # type: ignore[assignment]
    return model


def test_products_of_a_model() -> None:
    assert product_dtype(layer(torch.float64)) == torch.float64
    assert product_dtype(layer(torch.bfloat16)) == torch.bfloat16
    four_bits = layer(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    assert product_dtype(four_bits) == torch.bfloat16
    assert product_dtype(layer(load_in_8bit=True)) == torch.float16


@pytest.mark.gpu
def test_float32_products_of_a_gpu_may_round_as_float16() -> None:
    model = layer().to("cuda")
    assert product_dtype(model) == torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert product_dtype(model) == torch.float16
    finally:
        torch.set_float32_matmul_precision(before)


class Embeds(nn.Module):
    """Tokens and what stands for them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 20, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.table(tokens)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_rounding_of_the_embeddings(dtype: torch.dtype) -> None:
    """At most a spacing of the dtype, the same at every call, and gone afterwards."""
    torch.manual_seed(0)
    model, tokens = Embeds(dtype), torch.arange(50)
    before = model(tokens).detach()
    with off_by_a_rounding(model, dtype):
        found = model(tokens).detach()
    with off_by_a_rounding(model, dtype):
        again = model(tokens)
    assert torch.equal(model(tokens), before)
    assert torch.equal(found, again)
    assert found.dtype == dtype
    apart = ((found.double() - before.double()) / before.double()).abs()
    assert 0 < float(apart.max()) <= torch.finfo(dtype).eps
    assert float((apart > 0).double().mean()) > 0.2
