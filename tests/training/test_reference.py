"""What the checks of a reference let pass, and what not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.tiny import batch_of, pairs_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sppo_lightning.losses import PairLogps
from sppo_lightning.pair_forward import PlainForward
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy
from sppo_lightning.policy.lora import copied_weights
from sppo_lightning.training.reference import check_reference_is_frozen, check_same_logps


@pytest.fixture(params=["none", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path), quantization=request.param, lora=LoRAConfig(rank=4, alpha=8))
    return load_policy(config, compute_dtype=torch.float32).train()


def logps(model: nn.Module) -> Tensor:
    forward = PlainForward()
    with torch.no_grad():
        return forward.token_logps(model, batch_of(pairs_of(), forward.layout(2)).rows)


def held_to(model: Any, reference: Any) -> Any:
    """A policy whose initial one is what the context ``reference`` yields."""

    @contextmanager
    def initial() -> Iterator[Any]:
        with reference() as held:
            yield SimpleNamespace(model=held)

    return SimpleNamespace(model=model, initial=initial)


def test_an_adapter_that_is_switched_off_is_frozen(model: Any) -> None:
    before = copied_weights(model)

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    check_reference_is_frozen(held_to(model, off), logps)
    after = copied_weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_adapter_that_is_left_on_is_not(model: Any) -> None:
    @contextmanager
    def on() -> Iterator[nn.Module]:
        yield model

    with pytest.raises(RuntimeError, match=r"moved by up to .* nat when the adapter did: it is not frozen"):
        check_reference_is_frozen(held_to(model, on), logps)


@pytest.mark.parametrize("noise", [1e-6, math.nan])
def test_on_a_cpu_a_frozen_reference_stays_to_the_last_bit(model: Any, noise: float) -> None:
    passes = iter(range(9))

    def unsteady(model: nn.Module) -> Tensor:
        return logps(model) + noise * next(passes)

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    with pytest.raises(RuntimeError, match=r"moved by up to \S+ nat when the adapter did: it is not frozen"):
        check_reference_is_frozen(held_to(model, off), unsteady)


def test_an_adapter_that_does_nothing_is_noticed(model: Any) -> None:
    @contextmanager
    def off() -> Iterator[nn.Module]:
        yield model

    with model.disable_adapter():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
        with pytest.raises(RuntimeError, match="the adapter is not in use"):
            check_reference_is_frozen(held_to(model, off), logps)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_log_ratios_have_to_be_zero(dtype: torch.dtype, tolerance: float) -> None:
    """Two pairs, 10 tokens: 4 and 6 tolerances apart make one a token."""
    zero = torch.zeros(2, dtype=torch.float64)

    def compare(size: float) -> None:
        chosen, rejected = torch.tensor([4.0, 0.0]), torch.tensor([0.0, -6.0])
        policy = PairLogps(*(side.double() * tolerance * size for side in (chosen, rejected)))
        check_same_logps(policy, PairLogps(zero, zero), tokens=10, dtype=dtype)

    compare(0.99)
    with pytest.raises(
        RuntimeError, match=r"differ by .* nat per token .*: the reference is not the policy's own"
    ):
        compare(1.01)
    with pytest.raises(RuntimeError, match="differ by nan"):
        compare(float("nan"))
