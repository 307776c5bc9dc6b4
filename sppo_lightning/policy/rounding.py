"""Roundings of a dtype: do updates survive them, and how far they move a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sppo_lightning.policy.sharding import full_tensor
from sppo_lightning.types import UserError


def check_updates_survive(parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Refuse a learning rate whose updates round to nothing in the dtype of the weights.

    An Adam step moves a weight by about the learning rate; it is lost where that is under half the spacing of
    the dtype at the weight's size.

    Raises:
        UserError: if most trainable weights could not move.
    """
    lost = total = 0
    for parameter in parameters:
        spacing = parameter.detach().abs().float() * torch.finfo(parameter.dtype).eps
        lost += int(full_tensor((spacing > 2 * learning_rate).sum()))
        total += parameter.numel()
    if total and lost > total / 2:
        raise UserError(
            f"model.learning_rate={learning_rate:g} is lost to rounding in {lost / total:.0%} of the trainable "
            "weights: hold them in float32 (model.policy.dtype: auto, trainer.precision: bf16-mixed) or use lora"
        )


@contextmanager
def off_by_a_rounding(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model's embeddings be off by half a spacing of a dtype, up or down by a coin's toss, always the same."""
    generator = torch.Generator().manual_seed(0)
    half = torch.finfo(dtype).eps / 2

    def nudge(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, embedded.shape, generator=generator) - 1
        exact = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        off: Tensor = exact * (1 + half * signs.to(exact))
        return off.to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()
