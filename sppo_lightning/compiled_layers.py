"""Decoder layers through ``torch.compile``, while a training forward needs them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sppo_lightning.adapters import unwrapped
from sppo_lightning.shared_attention import leave_uncompiled


def compile_layers(model: nn.Module) -> None:
    """Let each decoder layer run compiled, for rows of any length; what was compiled before serves again."""
    layers = [layer for layer in decoder_layers(model) if layer._compiled_call_impl is None]
    if layers:
        leave_uncompiled()
    for layer in layers:
        layer.compile(dynamic=True)


def run_plain(model: nn.Module) -> None:
    """Let the layers run as they are written: sampling grows by one token a call."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that may be compiled, recomputed or spread one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in unwrapped(model).modules() if isinstance(module, GradientCheckpointingLayer))
