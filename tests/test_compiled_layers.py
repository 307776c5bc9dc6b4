"""Decoder layers through ``torch.compile``: the same log-probs, and only while training's forward needs them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from tiny import alone, batch_of, close_gradients, gradients, new_model, pairs_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from sppo_lightning.forward_trial import Trial
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward
from sppo_lightning.policy import load_policy
from sppo_lightning.policy_config import LoRAConfig, PolicyConfig

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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_compiled_layers_with_an_adapter_give_the_same(tmp_path: Path, quantization: Any) -> None:
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path), quantization=quantization, lora=LoRAConfig(rank=4, alpha=8))
    model = load_policy(config, compute_dtype=torch.float32).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    rows = batch_of(pairs_of(), SharedForward().layout(2)).rows
    found = []
    for compiled in (False, True):
        forward = SharedForward(compiled=compiled)
        forward.logps(model, rows)
        logps = forward.token_logps(model, rows)
        found.append((logps.detach(), gradients(model, logps)))
        forward.release(model)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-5)
    close_gradients(found[1][1], found[0][1], tolerance=5e-5)


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
