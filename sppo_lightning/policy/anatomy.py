"""What PEFT adds to a model: a wrapper around it, and layers that hold an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning.types import UserError


def unwrapped(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT's wrapper, its layers still with the adapter; else the model."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if inner else model


def embedding_rows(model: nn.Module) -> int:
    """Return how many token ids a causal language model has embeddings for, adapted ones or not."""
    rows: int = unwrapped(model).get_input_embeddings().weight.shape[0]
    return rows


def adapter_readme(model: nn.Module, loader: str) -> str:
    """Return the ``README.md`` of a model's adapter in PEFT's layout: its base, and how to load the two.

    Args:
        model: PEFT's.
        loader: name of transformers' class to load the base by.
    """
    config = cast(Any, model).peft_config["default"]
    base = str(config.base_model_name_or_path)
    lines = [
        f"# A {'DoRA' if config.use_dora else 'LoRA'} adapter",
        f"Written by sppo-lightning while training. Its base is `{base}`, which it is loaded with by PEFT:",
        f"```python\n{_loading(base, loader)}\n```",
    ]
    if config.use_dora:
        lines.append(
            "`AutoModelForCausalLM.from_pretrained` of transformers 5 leaves out the magnitudes of a DoRA adapter "
            "without a word, and gives another model: load it as above."
        )
    lines.append(
        "`sppo-lightning export` writes the policy into a folder for others, checked, with a full model card."
    )
    return "\n\n".join(lines) + "\n"


def opened_by_peft(base: str, loader: str) -> bool:
    """Whether PEFT finds and loads an adapter's base by itself: no ``.gguf`` file, no model that sees as well.

    Args:
        base: where it is.
        loader: name of transformers' class to load it by.
    """
    return loader == "AutoModelForCausalLM" and not base.endswith(".gguf")


def _loading(base: str, loader: str) -> str:
    if opened_by_peft(base, loader):
        return (
            "from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")'
        )
    return (
        f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
        f"base = {loader}.from_pretrained({base_arguments(base)})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
    )


def base_arguments(base: str) -> str:
    """Return what ``from_pretrained`` is called with to load an adapter's base, as Python text."""
    place = Path(base)
    return f'"{place.parent}", gguf_file="{place.name}"' if base.endswith(".gguf") else f'"{base}"'


def decoders(model: nn.Module) -> list[Any]:
    """Return the models inside a causal language model, outermost first; the first ends in its hidden states."""
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    return [part for part in inner.modules() if isinstance(part, PreTrainedModel) and part is not inner]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that may be compiled, recomputed or spread one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in unwrapped(model).modules() if isinstance(module, GradientCheckpointingLayer))


def beside_text(model: nn.Module) -> list[str]:
    """Return the names of a model's modules that text never passes through: those that see or hear.

    Args:
        model: a causal language model, PEFT's wrapper around it or not; the names are those inside the wrapper.
    """
    reached = _reached_by_text(model)
    return list(_apart(unwrapped(model), reached, "")) if reached else []


def freeze_beside_text(model: nn.Module) -> None:
    """Train nothing that text never passes through: it gets no gradient, for which DDP would wait.

    Args:
        model: as :func:`beside_text` takes it.
    """
    reached = _reached_by_text(model)
    within = {id(parameter) for part in reached for parameter in part.parameters()}
    for parameter in unwrapped(model).parameters():
        if reached and id(parameter) not in within:
            parameter.requires_grad_(False)


def _reached_by_text(model: nn.Module) -> set[Any]:
    """Return decoder and head of a model that does more than read and write text; none if it does not."""
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
