"""Decoder layers through ``torch.compile``, while a training forward needs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sppo_lightning.pair_forward.shared_attention import leave_uncompiled
from sppo_lightning.policy.anatomy import decoder_layers


def compile_layers(model: nn.Module) -> None:
    """Let each decoder layer run compiled, for rows of any length; what was compiled before serves again."""
    layers: list[Any] = [layer for layer in decoder_layers(model) if not _is_compiled(layer)]
    if layers:
        leave_uncompiled()
    for layer in layers:
        if layer.gradient_checkpointing:
            layer.own_checkpointing = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = _recomputed
        else:
            layer.compile(dynamic=True)


def run_plain(model: nn.Module) -> None:
    """Let the layers run as they are written: sampling grows by one token a call."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
        if _is_compiled(layer):
            kept: Any = layer
            kept._gradient_checkpointing_func = kept.own_checkpointing
            del kept.own_checkpointing


def _is_compiled(layer: nn.Module) -> bool:
    return layer._compiled_call_impl is not None or hasattr(layer, "own_checkpointing")


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Run a layer compiled, and once more in the backward pass.

    torch compiles a checkpoint only if nothing in it stays uncompiled, as our attention does, and leaves everything
    uncompiled that runs inside of a checkpoint: so the checkpoint is the function after that mark, and what it calls
    is compiled.
    """
    compiled = torch.compile(function, dynamic=True)
    return _checkpoint(compiled, *args, use_reentrant=False)


_checkpoint = inspect.unwrap(cast(Any, checkpoint))
