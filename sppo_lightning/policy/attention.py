"""Attention overrides: a function in place of a model's attention, for as long as a pass lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sppo_lightning.policy.anatomy import layer_types, unwrapped

Attention = Callable[..., tuple[Tensor, None]]
"""What transformers calls in each layer: ``[B, heads, T, D]`` in, ``[B, T, heads, D]`` out."""

NOT_HANDLED = ("softcap", "s_aux", "position_bias", "cache")  # what a model may ask of its attention besides

# what an attached model attended with: itself under "", and each of its parts that has a config of its own
_before: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


class CannotAttendError(Exception):
    """A model cannot do with an attention override; says why."""


def whole_mask(device: torch.device) -> Tensor:
    """Return a mask that a model hands on to its attention as it is, which :func:`check_call` expects."""
    # without one of four dimensions a model makes its own, and takes restarting positions for documents
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def check_call(module: nn.Module, attention_mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Refuse what a model's layer asks of its attention and would not get.

    Args:
        module: the layer.
        attention_mask: :func:`whole_mask`, as far as the layer left it alone.
        others: the call's arguments that an attention override does not look at.

    Raises:
        CannotAttendError: naming them.
    """
    if attention_mask is None or attention_mask.numel() != 1:
        raise CannotAttendError(f"{type(module).__name__} changes its attention mask")
    asked = [name for name in NOT_HANDLED if others.get(name) is not None]
    if asked or others.get("dropout"):
        raise CannotAttendError(f"{type(module).__name__} needs {' and '.join(asked) or 'dropout'}")


def attach(model: nn.Module, name: str, attention: Attention, layers: set[str]) -> None:
    """Override a model's attention by a function, until :func:`detach`.

    Args:
        model: a transformers model, PEFT's wrapper around it or not.
        name: of the override; a function that is registered under it already is left there.
        attention: the function.
        layers: types of layers that it does for, as in a config's ``layer_types``.

    Raises:
        CannotAttendError: if the model's attention cannot be replaced.
    """
    from transformers import AttentionInterface

    inner = unwrapped(model)
    config = inner.config
    if config._attn_implementation == name:
        return
    before = {"": config._attn_implementation}
    before |= {
        key: getattr(config, key)._attn_implementation for key in config.sub_configs if getattr(config, key)
    }
    others = layer_types(inner) - layers
    if others:
        raise CannotAttendError(f"{type(inner).__name__} has layers of {', '.join(sorted(others))}")
    if name not in AttentionInterface():
        AttentionInterface.register(name, cast(Any, attention))
    inner.set_attn_implementation(name)
    if config._attn_implementation != name:
        raise CannotAttendError(f"{type(inner).__name__} does not let its attention be replaced")
    _before[inner] = before


def detach(model: nn.Module) -> None:
    """Give a model its own attention back."""
    inner = unwrapped(model)
    if inner in _before:
        inner.set_attn_implementation(_before.pop(inner))
