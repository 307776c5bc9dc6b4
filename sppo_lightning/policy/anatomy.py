"""What a policy is made of: the model inside PEFT's wrapper, its decoder and layers, its non-text modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT's wrapper, its layers still with the adapter; else the model."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if inner else model


def embedding_rows(model: nn.Module) -> int:
    """Return how many token ids a causal language model has embeddings for, adapted ones or not."""
    rows: int = unwrapped(model).get_input_embeddings().weight.shape[0]
    return rows


def decoders(model: nn.Module) -> list[Any]:
    """Return the models inside a causal language model, outermost first; the first ends in its hidden states."""
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    return [part for part in inner.modules() if isinstance(part, PreTrainedModel) and part is not inner]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that may be compiled, recomputed or sharded one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in unwrapped(model).modules() if isinstance(module, GradientCheckpointingLayer))


def non_text_modules(model: nn.Module) -> list[str]:
    """Return the names of a multimodal model's modules that text never passes through, such as a vision tower.

    Args:
        model: a causal language model, PEFT's wrapper around it or not; the names are those inside the wrapper.
    """
    reached = _reached_by_text(model)
    return list(_apart(unwrapped(model), reached, "")) if reached else []


def freeze_non_text_modules(model: nn.Module) -> None:
    """Train nothing that text never passes through: it gets no gradient, for which DDP would wait.

    Args:
        model: as :func:`non_text_modules` takes it.
    """
    reached = _reached_by_text(model)
    within = {id(parameter) for part in reached for parameter in part.parameters()}
    for parameter in unwrapped(model).parameters():
        if reached and id(parameter) not in within:
            parameter.requires_grad_(False)


def _reached_by_text(model: nn.Module) -> set[Any]:
    """Return decoder and head of a multimodal model; none of a model for text alone."""
    inner = unwrapped(model)
    text_config = inner.config.get_text_config(decoder=True)
    if text_config is inner.config:
        return set()
    found = {part for part in decoders(model) if type(part.config) is type(text_config)}
    return found | {inner.get_output_embeddings()} if found else set()


def _apart(module: nn.Module, reached: set[Any], prefix: str) -> Iterator[str]:
    """Yield the names of a module's parts that neither are among some modules nor hold one of them."""
    for name, child in module.named_children():
        if child in reached:
            continue
        if any(part in reached for part in child.modules()):
            yield from _apart(child, reached, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def window_of(model: nn.Module) -> int | None:
    """Return the tokens that a layer with a window sees; ``None`` if no layer has one."""
    types = layer_types(model)
    if types and "sliding_attention" not in types:
        return None
    window: int | None = getattr(
        unwrapped(model).config.get_text_config(decoder=True), "sliding_window", None
    )
    return window


def layer_types(model: nn.Module) -> set[str]:
    """Return the types of a model's layers, as far as its config says them."""
    return set(getattr(unwrapped(model).config.get_text_config(decoder=True), "layer_types", None) or ())


def text_settings(model: Any) -> Any:
    """Return a model's settings for text: its own, or those of a multimodal model's decoder."""
    return model.config.get_text_config(decoder=True)
