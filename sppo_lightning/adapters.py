"""What PEFT adds to a model: a wrapper around it, and layers that hold an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def unwrapped(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT's wrapper, its layers still with the adapter; else the model."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if inner else model


def decoders(model: nn.Module) -> list[Any]:
    """Return the models inside a causal language model, outermost first; the first ends in its hidden states."""
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    return [part for part in inner.modules() if isinstance(part, PreTrainedModel) and part is not inner]


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights under the names of its checkpoint, an adapter that is switched on merged into them.

    One weight is merged at a time, so that no second model exists; neither base nor adapter changes.
    """
    base = unwrapped(model)
    layers: dict[str, Any] = {
        name: layer for name, layer in base.named_modules() if hasattr(layer, "get_delta_weight")
    }
    adapters = {
        id(parameter)
        for layer in layers.values()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, parameter in base.named_parameters():
        if id(parameter) in adapters:
            continue
        weight = parameter.detach()
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                weight = (weight + layer.get_delta_weight(adapter).detach()).to(parameter.dtype)
        yield name.replace(".base_layer.", "."), weight
