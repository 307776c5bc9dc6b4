"""The training module's optimizer and clipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from support.models import tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from sppo_lightning.losses import DPOLoss
from sppo_lightning.module import PreferenceModule
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.types import UserError


def module_with(precision: str, clip: float | None, optimizer: Any = None) -> PreferenceModule:
    config = PolicyConfig("made in the test")
    module = PreferenceModule(config, DPOLoss(0.1), 1e-3, reference="previous_iteration", optimizer=optimizer)
    module.policy = LlamaForCausalLM(tiny_config())
    module.trainer = SimpleNamespace(precision=precision, gradient_clip_val=clip)  # type: ignore[assignment]
    return module


def fused_adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [
        ("32-true", 1.0, True),
        ("bf16-mixed", 1.0, True),
        ("16-mixed", None, True),
        ("16-mixed", 1.0, False),
    ],
)
def test_the_default_optimizer_is_fused_where_it_can_be(
    precision: str, clip: float | None, fused: bool
) -> None:
    optimizer = module_with(precision, clip).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is fused


def test_a_fused_optimizer_with_scaled_gradients_that_are_clipped_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"fused optimizer do not go together under 16-mixed: leave out one of"
    ):
        module_with("16-mixed", 1.0, fused_adamw).configure_optimizers()
    module_with("bf16-mixed", 1.0, fused_adamw).configure_optimizers()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_under_bf16_with_a_fused_optimizer(algorithm: str) -> None:
    module = module_with("bf16-mixed", 0.5)
    optimizer = module.configure_optimizers()
    assert module.policy is not None
    for parameter in module.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(optimizer, 0.5, algorithm)
    gradients = [p.grad for p in module.policy.parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    largest = max(float(gradient.max()) for gradient in gradients)
    if algorithm == "norm":
        assert norm == pytest.approx(0.5, rel=1e-4)
    else:
        assert largest == 0.5
        assert norm > 1


def test_a_clip_value_below_zero_clips_nothing() -> None:
    """As in Lightning; a norm scaled to a negative value would turn the gradients round."""
    module = module_with("bf16-mixed", -1.0)
    optimizer = module.configure_optimizers()
    module.trainer.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    module.trainer.gradient_clip_algorithm = None
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(optimizer, -1.0, "norm")
    assert bool((parameter.grad == 1).all())
