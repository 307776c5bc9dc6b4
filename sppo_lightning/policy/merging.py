"""An adapter merged into its base, one weight at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.types import UserError


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights under the names of its checkpoint, an adapter that is switched on merged into them.

    One weight is merged at a time, in float32, and rounded once to the base's dtype, so that no second model exists;
    neither base nor adapter changes.

    Raises:
        UserError: if the adapter cannot be merged exactly.
    """
    base = unwrapped(model)
    layers = adapted_layers(model)
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
            weight = merged_weight(layer).to(parameter.dtype)
        yield name.replace(".base_layer.", "."), weight


def merge_into_base(model: nn.Module, *, dtype: torch.dtype) -> Any:
    """Merge an adapter for good, one weight at a time, and return the transformers model without it.

    Args:
        model: with a PEFT adapter, which is used up.
        dtype: of the weights afterwards; each is rounded to it once. What the model holds in another dtype than most
            of its weights stays as it is.

    Raises:
        UserError: if the adapter cannot be merged exactly.
    """
    usual = unwrapped(model).dtype
    for layer in adapted_layers(model).values():
        layer.get_base_layer().weight.data = merged_weight(layer).to(dtype)
    base: Any = cast(Any, model).unload()
    for parameter in base.parameters():
        if parameter.dtype == usual:
            parameter.data = parameter.data.to(dtype)
    return base


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the name of the layer that each adapts.

    Raises:
        UserError: if one of them cannot be merged exactly: over quantised or shared weights, or of another kind than
            LoRA and DoRA.
    """
    base = unwrapped(model)
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    found: dict[str, Any] = {}
    for name, layer in base.named_modules():
        if hasattr(layer, "modules_to_save"):
            raise UserError(
                f"the adapter replaces {name} as a whole (modules_to_save), which is no part of LoRA: only low-rank "
                "updates can be merged"
            )
        if hasattr(layer, "get_delta_weight"):
            _check_mergeable(name, layer, owners)
            found[name] = layer
    return found


def merged_weight(layer: Any) -> Tensor:
    """Return the weight of one of PEFT's layers with its active adapters, in float32 (float64 for float64 weights)."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach()
        if adapter in layer.lora_variant:
            # DoRA (arXiv 2402.09353) gives each output a length of its own; an embedding's outputs are its columns
            outputs = 1 if layer.fan_in_fan_out or _is_embedding(layer) else 0
            length = torch.linalg.vector_norm(weight, dim=1 - outputs, keepdim=True)
            weight = weight * (layer.lora_magnitude_vector[adapter].weight.detach().view_as(length) / length)
    return weight


def _check_mergeable(name: str, layer: Any, owners: Counter[int]) -> None:
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or weight.ndim != 2:
        raise UserError(f"the adapter on {name} adapts no plain matrix, and cannot be merged")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UserError(
            f"the adapter on {name} lies on quantised weights, which merging would ruin: load the base without "
            "quantisation"
        )
    if owners[id(weight)] > 1:
        raise UserError(
            f"the adapter on {name} lies on weights that serve as embedding and as head: merging would change both; "
            "use it unmerged, or train without that layer in model.policy.lora.target_modules"
        )
    kinds = [layer.lora_variant.get(adapter) for adapter in layer.active_adapters]
    if any(
        kind is not None and not isinstance(kind, DoraLinearVariant | DoraEmbeddingVariant) for kind in kinds
    ):
        raise UserError(f"the adapter on {name} is neither LoRA nor DoRA, and cannot be merged")
    if any(layer.lora_bias.get(adapter) for adapter in layer.active_adapters):
        raise UserError(f"the adapter on {name} has a bias of its own (lora_bias), and cannot be merged")


def _is_embedding(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Embedding)
