"""Decoder layers through ``torch.compile``: the same log-probs, and only while training's forward needs them."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import alone, batch_of, close_gradients, gradients, new_model, pairs_of
from torch import Tensor
from torch._dynamo.utils import counters

from sppo_lightning.forward_trial import Trial
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
LENGTHS = [(12, 4, 7), (9, 11, 3), (5, 5, 5)]


def trial() -> Trial:
    return Trial(40, torch.no_grad, bool)


@pytest.mark.parametrize("forward_class", [SharedForward, PlainForward])
def test_compiled_layers_give_the_same(forward_class: type[PairForward]) -> None:
    """For rows of any length, without compiling anew for each."""
    model, pairs = new_model(), pairs_of(LENGTHS)
    expected = alone(model, pairs)
    expected_gradients = gradients(model, expected)
    forward = forward_class(compiled=True)
    layout = forward.layout(2)

    def tokens(lengths: list[tuple[int, int, int]]) -> Tensor:
        rows = batch_of(pairs_of(lengths), layout).rows
        forward.logps(model, rows)
        found = forward.token_logps(model, rows)
        forward.release(model)
        return found

    found = tokens(LENGTHS)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    close_gradients(gradients(model, found), expected_gradients, tolerance=1e-5)
    graphs = []
    for shift in range(1, 5):
        lengths = [(p + shift, c + shift, r + 2 * shift) for p, c, r in LENGTHS]
        with torch.no_grad():
            expected = alone(model, pairs_of(lengths))
        torch.testing.assert_close(tokens(lengths).double(), expected, rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] > 0


def test_a_released_model_runs_as_it_is_written() -> None:
    model = new_model()
    forward = AutoForward(compiled=True)
    forward.prepare(model, trial())
    forward.logps(model, batch_of(pairs_of(), forward.layout(2)).rows)
    layers = list(model.model.layers)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    forward.release(model)
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert model.config._attn_implementation == "sdpa"
