"""The optimizer of the trained weights, and the clipping of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sppo_lightning.policy.sharding import local
from sppo_lightning.types import UserError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def clips_unscaled(compute_dtype: torch.dtype, *, clips: bool) -> bool:
    """Whether gradients are scaled for float16 and clipped, which a fused optimizer cannot take.

    Args:
        compute_dtype: dtype of the trainer's matrix products.
        clips: whether gradients are clipped.
    """
    return clips and compute_dtype == torch.float16


def build_optimizer(
    factory: OptimizerFactory | None,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    clips_unscaled: bool,
) -> Optimizer:
    """Return an optimizer over two groups of parameters: matrices, which decay, and the rest, which do not.

    Args:
        factory: makes it of the groups; ``None``: AdamW, fused where that goes.
        parameters: what is trained.
        learning_rate: peak rate.
        weight_decay: of matrices, per step and unit of rate.
        clips_unscaled: what the function of that name says.

    Raises:
        UserError: if the factory's optimizer is fused all the same, or cannot take sharded weights.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, fused=not clips_unscaled) if factory is None else factory(groups)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    if sharded and type(optimizer).__module__.startswith("bitsandbytes."):
        raise UserError(
            f"model.optimizer {type(optimizer).__name__} does not know sharded weights: leave "
            "it out, or use strategy ddp"
        )
    if clips_unscaled and optimizer.defaults.get("fused"):
        raise UserError(
            "trainer.gradient_clip_val and a fused optimizer do not go together under 16-mixed: leave out one "
            "of them, or use bf16-mixed"
        )
    return optimizer


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, *, algorithm: str | None) -> None:
    """Clip gradients in place.

    Args:
        parameters: whose gradients.
        limit: largest norm of all together, or largest value.
        algorithm: ``norm`` (also ``None``) or ``value``, as in Lightning.
    """
    if algorithm == "value":
        for parameter in parameters:
            if parameter.grad is not None:
                local(parameter.grad).clamp_(-limit, limit)
    else:
        nn.utils.clip_grad_norm_(parameters, limit)


def reset_state(optimizer: Optimizer) -> None:
    """Reset an optimizer to its start, and free its state.

    What a paged optimizer of bitsandbytes holds is never freed, so that it is emptied and used again.
    """
    for state in optimizer.state.values():
        held = [value for value in state.values() if isinstance(value, Tensor)]
        if not any(getattr(value, "is_paged", False) for value in held):
            state.clear()
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):
                value.zero_()
        state["step"] = 0
    for parameter in [parameter for parameter, state in optimizer.state.items() if not state]:
        del optimizer.state[parameter]
