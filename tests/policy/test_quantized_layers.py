"""Quantised layers give one product in every mode and every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_config
from transformers import LlamaForCausalLM

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_base_model


@pytest.fixture(params=["nf4", "int8"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path), quantization=request.param, lora=LoRAConfig(rank=1, alpha=1))
    return load_base_model(config, compute_dtype=torch.float32)


def outlying(rows: int) -> torch.Tensor:
    """Rows of which the last has a value far from all others."""
    inputs = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    inputs[-1, 7] = 40.0
    return inputs


@torch.no_grad()
def test_training_and_sampling_multiply_alike(model: Any) -> None:
    layer, inputs = model.model.layers[0].mlp.up_proj, outlying(5)
    torch.testing.assert_close(layer.train()(inputs), layer.eval()(inputs), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(model: Any, training: bool) -> None:
    layer, inputs = model.model.layers[0].mlp.up_proj.train(training), outlying(6)
    torch.testing.assert_close(layer(inputs)[:3], layer(inputs[:3]), rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_dequantised_weights(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj.train()
    identity = torch.eye(128)
    with torch.no_grad():
        weight = layer(identity).T
    inputs = torch.randn(4, 128, generator=torch.Generator().manual_seed(2), requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)


def test_products_are_in_the_autocast_dtype(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = layer(outlying(3))
    exact = layer(outlying(3)).detach()
    assert float((found.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())
