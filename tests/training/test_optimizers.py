"""The optimizer of the trained weights: groups, 8-bit states, clipping."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from sppo_lightning.training.optimizers import build_optimizer, clip_gradients, reset_state


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (128,), (3, 64), (64,))
    ]


def build(factory: Any = None) -> torch.optim.Optimizer:
    return build_optimizer(factory, parameters(), learning_rate=0.1, weight_decay=0.5, clips_unscaled=False)


@pytest.mark.parametrize("factory", [None, torch.optim.SGD, bitsandbytes.optim.AdamW8bit])
def test_matrices_decay_and_the_rest_does_not(factory: Any) -> None:
    optimizer = build(factory)
    groups = [
        ([tuple(p.shape) for p in group["params"]], group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
    ]
    assert groups == [([(64, 128), (3, 64)], 0.5, 0.1), ([(128,), (64,)], 0.0, 0.1)]


@pytest.mark.parametrize("paged", [False, True])
def test_a_forgotten_optimizer_begins_anew(paged: bool) -> None:
    """What is paged, which takes a GPU, is kept and emptied; here it is only called so."""

    def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    used, fresh = build(bitsandbytes.optim.AdamW8bit), build(bitsandbytes.optim.AdamW8bit)
    step(used, 1)
    states = [state["state1"] for state in used.state.values() if state["state1"].dtype == torch.uint8]
    for state in states:
        state.is_paged = paged
    reset_state(used)
    assert len(used.state) == (len(states) if paged else 0)
    for one, other in zip(used.param_groups, fresh.param_groups, strict=True):
        for parameter, same in zip(one["params"], other["params"], strict=True):
            parameter.data = same.data.clone()
    step(used, 2)
    step(fresh, 2)
    for one, other in zip(used.param_groups, fresh.param_groups, strict=True):
        for parameter, same in zip(one["params"], other["params"], strict=True):
            assert torch.equal(parameter, same)
    assert {int(state["step"]) for state in used.state.values()} == {1}


def test_8_bit_states_take_a_step_that_is_nearly_adamws() -> None:
    """Moments of the 8,192 weights are held in 8 bits; bitsandbytes leaves small parameters in 32."""
    plain, small = build(), build(bitsandbytes.optim.AdamW8bit)
    for optimizer in (plain, small):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, other in zip(plain.param_groups, small.param_groups, strict=True):
        for expected, found in zip(one["params"], other["params"], strict=True):
            assert float((found.detach() - expected.detach()).abs().mean()) < 0.01  # of a step of 0.1
    states = [small.state[parameter]["state1"].dtype for parameter in small.param_groups[0]["params"]]
    assert states == [torch.uint8, torch.float32]


@pytest.mark.parametrize(("algorithm", "largest"), [("value", 0.5), ("norm", 0.0625), (None, 0.0625)])
def test_clipping(algorithm: str | None, largest: float) -> None:
    """64 gradients of 2 have norm 16; cut to 0.5 each is 0.0625."""
    parameter = nn.Parameter(torch.zeros(64))
    parameter.grad = torch.full((64,), 2.0)
    clip_gradients([parameter], 0.5, algorithm=algorithm)
    assert float(parameter.grad.max()) == pytest.approx(largest, rel=1e-4)
