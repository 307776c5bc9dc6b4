"""Decoder layers through ``torch.compile``: the same log-probs, and only while training's forward needs them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.tiny import alone, batch_of, close_gradients, gradients, new_model, pairs_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
LENGTHS = [(12, 4, 7), (9, 11, 3), (5, 5, 5)]


def check() -> ParityCheck:
    return ParityCheck(40, torch.no_grad, bool)


@pytest.mark.parametrize(
    ("forward_class", "checkpointing"),
    [
        (SharedForward, False),
        (PlainForward, True),
        pytest.param(SharedForward, True, marks=pytest.mark.slow),
        pytest.param(PlainForward, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_give_the_same(forward_class: type[PairForward], checkpointing: bool) -> None:
    """For rows of any length, without compiling anew for each; recomputed in the backward pass or not."""
    model, pairs = new_model(), pairs_of(LENGTHS)
    expected = alone(model, pairs)
    expected_gradients = gradients(model, expected)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    counters.clear()
    forward = forward_class(compiled=True)
    layout = forward.layout(2)

    def read(lengths: list[tuple[int, int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch_of(pairs_of(lengths), layout).rows
        forward.logps(model, rows)
        logps = forward.token_logps(model, rows)
        found = logps.detach(), gradients(model, logps)
        forward.release(model)
        return found

    found, found_gradients = read(LENGTHS)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    close_gradients(found_gradients, expected_gradients, tolerance=1e-5)
    graphs = []
    for shift in range(1, 5):
        lengths = [(p + shift, c + shift, r + 2 * shift) for p, c, r in LENGTHS]
        with torch.no_grad():
            expected = alone(model, pairs_of(lengths))
        torch.testing.assert_close(read(lengths)[0].double(), expected, rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_compiled_layers_with_an_adapter_give_the_same(
    tmp_path: Path, quantization: Any, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(
        tiny_config(hidden_size=64, intermediate_size=128, initializer_range=0.1)
    ).save_pretrained(tmp_path)
    config = PolicyConfig(
        str(tmp_path),
        quantization=quantization,
        lora=LoRAConfig(rank=4, alpha=8),
        gradient_checkpointing=checkpointing,
    )
    model = load_policy(config, compute_dtype=torch.float32).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02
    rows = batch_of(pairs_of(), SharedForward().layout(2)).rows
    found = []
    for compiled in (False, True):
        forward = SharedForward(compiled=compiled)
        forward.logps(model, rows)
        logps = forward.token_logps(model, rows)
        found.append((logps.detach(), gradients(model, logps)))
        forward.release(model)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    close_gradients(found[1][1], found[0][1], tolerance=1e-5)


def test_checkpointed_layers_keep_their_inputs_alone() -> None:
    """What the backward pass finds stored is less than without checkpoints, as it is where nothing is compiled."""

    def stored(*, compiled: bool, checkpointing: bool) -> int:
        model = new_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        forward = SharedForward(compiled=compiled)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logps = forward.token_logps(model, batch_of(pairs_of(LENGTHS), forward.layout(2)).rows)
        forward.release(model)
        assert logps.requires_grad
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    plain = stored(compiled=False, checkpointing=True)
    assert stored(compiled=True, checkpointing=True) <= plain < stored(compiled=True, checkpointing=False) / 2


def test_a_released_model_recomputes_its_layers_as_before() -> None:
    model = new_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = [layer._gradient_checkpointing_func for layer in model.model.layers]
    forward = SharedForward(compiled=True)
    for _ in range(2):
        forward.logps(model, batch_of(pairs_of(), forward.layout(2)).rows)
        assert all(layer._gradient_checkpointing_func not in own for layer in model.model.layers)
        forward.release(model)
        assert [layer._gradient_checkpointing_func for layer in model.model.layers] == own
        forward.release(model)


def test_a_released_model_runs_as_it_is_written() -> None:
    model = new_model()
    forward = AutoForward(compiled=True)
    forward.prepare(model, check())
    forward.logps(model, batch_of(pairs_of(), forward.layout(2)).rows)
    layers = list(model.model.layers)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    forward.release(model)
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert model.config._attn_implementation == "sdpa"
