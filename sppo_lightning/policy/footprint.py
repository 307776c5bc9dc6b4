"""Bytes that weights take, from their shapes alone: a model on the meta device is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.sharding import layers_to_shard
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MatrixBytes = Callable[[int, int], int]
"""Bytes of a quantised matrix, given its outputs and inputs."""

# how bitsandbytes 0.50 holds 4-bit weights: scales and the tables that codes are looked up in, per matrix
NF4_BLOCK, NF4_TABLE = 64, 16 * 4
SCALE_BLOCK, SCALE_TABLE = 256, 256 * 4 + 4


class CannotEstimateError(UserError):
    """A model whose memory cannot be told from its config; it may well run."""


class Footprint(NamedTuple):
    """What the weights of a model take."""

    frozen: int  # bytes of weights that are not trained, and of buffers
    trained: int  # bytes of weights that are trained
    trained_count: int  # weights that are trained
    frozen_count: int  # weights that are not, each of a quantised matrix counted
    widest: int  # bytes of the largest quantised matrix once it is dequantised; 0: none is quantised

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.frozen + self.trained


class Gathered(NamedTuple):
    """What is gathered on each device, a part at a time, where weights are sharded."""

    layer: int  # bytes of the largest layer
    layer_trained: int  # of which trained
    rest: int  # bytes of what lies in no layer: embedding, head, last norm
    rest_trained: int  # of which trained

    @property
    def reading(self) -> int:
        """Bytes in a forward pass: a layer, the next one, and either's way from one block to its weights."""
        return max(2 * self.rest, self.rest + 3 * self.layer)

    @property
    def training(self) -> int:
        """Bytes in a backward pass: the gradients as well, and a copy of a layer's while they are summed up."""
        return self.reading + self.rest_trained + 3 * self.layer_trained


def gathered(model: nn.Module) -> Gathered:
    """Return how large the parts are that a model is sharded in.

    Args:
        model: a transformers model, PEFT's wrapper around it or not, on any device.
    """
    everything = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    layers = [
        (
            sum(parameter.nbytes for parameter in layer.parameters()),
            sum(parameter.nbytes for parameter in layer.parameters() if parameter.requires_grad),
        )
        for layer in layers_to_shard(model)
    ]
    return Gathered(
        layer=max((size for size, _ in layers), default=0),
        layer_trained=max((size for _, size in layers), default=0),
        rest=everything - sum(size for size, _ in layers),
        rest_trained=trained - sum(size for _, size in layers),
    )


def loaded_footprint(
    model: nn.Module,
    model_config: PretrainedConfig,
    quantization: Literal["none", "nf4", "int8"],
    *,
    double: bool = True,
) -> Footprint:
    """Return what a model's weights take once they are read; those that are stored quantised stay so.

    Args:
        model: as :func:`footprint` takes it.
        model_config: of the checkpoint; its own quantisation goes before ``quantization``, as in transformers.
        quantization: of a checkpoint that is not quantised.
        double: the scales of ``nf4`` are quantised too.

    Raises:
        CannotEstimateError: if the weights are stored quantised, but not by bitsandbytes.
    """
    stored = _stored_quantization(model_config)
    if stored is None:
        return footprint(model, quantized_matrix(quantization, double=double))
    kept = stored.get("llm_int8_skip_modules")
    if stored.get("load_in_4bit"):
        nested = bool(stored.get("bnb_4bit_use_double_quant"))
        return footprint(model, quantized_matrix("nf4", double=nested), kept=kept)
    if stored.get("load_in_8bit"):
        return footprint(model, quantized_matrix("int8"), kept=kept)
    raise CannotEstimateError(
        f"the memory of a model with {stored.get('quant_method')!r} weights cannot be estimated: only those of "
        "bitsandbytes are counted; give the model that is not quantised, or watch the memory of a short run"
    )


def footprint(
    model: nn.Module, matrix_bytes: MatrixBytes | None = None, *, kept: list[str] | None = None
) -> Footprint:
    """Return what a model's weights take; shared weights count once.

    Args:
        model: a transformers model, PEFT's wrapper around it or not, on any device; not quantised itself.
        matrix_bytes: of each matrix that transformers would quantise; ``None``: it is held as it is.
        kept: modules that are not quantised; ``None``: transformers' own choice.
    """
    quantized: dict[int, int] = {}
    widest = 0
    if matrix_bytes is not None:
        for weight, outputs in _quantizable(unwrapped(model), kept):
            quantized[id(weight)] = matrix_bytes(outputs, weight.numel() // outputs)
            widest = max(widest, weight.nbytes)
    frozen = sum(buffer.nbytes for buffer in model.buffers())
    trained = trained_count = frozen_count = 0
    for parameter in model.parameters():
        size = quantized.get(id(parameter), parameter.nbytes)
        if parameter.requires_grad:
            trained += size
            trained_count += parameter.numel()
        else:
            frozen += size
            frozen_count += parameter.numel()
    return Footprint(frozen, trained, trained_count, frozen_count, widest)


def quantized_matrix(kind: Literal["none", "nf4", "int8"], *, double: bool = True) -> MatrixBytes | None:
    """Return how many bytes a matrix takes under a ``quantization``; ``None``: as many as before.

    Args:
        kind: of the weights.
        double: the scales of ``nf4`` are quantised too.
    """
    known: dict[str, MatrixBytes] = {"nf4": partial(_nf4_bytes, double=double), "int8": _int8_bytes}
    return known.get(kind)


def _nf4_bytes(outputs: int, inputs: int, *, double: bool) -> int:
    """Half a byte a weight and a scale a block: of four bytes, or of one and a scale a block of scales."""
    blocks = -(-outputs * inputs // NF4_BLOCK)
    scales = blocks + 4 * -(-blocks // SCALE_BLOCK) + SCALE_TABLE if double else 4 * blocks
    return -(-outputs * inputs // 2) + scales + NF4_TABLE


def _int8_bytes(outputs: int, inputs: int) -> int:
    """One byte a weight, and a scale of four bytes an output."""
    return outputs * inputs + 4 * outputs


def _quantizable(model: Any, skipped: list[str] | None) -> Iterator[tuple[Tensor, int]]:
    """Yield each matrix that transformers hands to bitsandbytes, and its outputs."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    adapted = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "")
        if any(bare.startswith(prefix) for prefix in adapted):
            continue  # the adapter's own matrices
        if isinstance(module, Conv1D) and should_convert_module(bare, kept):
            yield module.weight, module.weight.shape[1]
        elif type(module) is nn.Linear and should_convert_module(bare, kept):
            yield module.weight, module.out_features


def layer_count(model_config: PretrainedConfig) -> int:
    """Return how many layers a model has.

    Raises:
        CannotEstimateError: if its config does not say.
    """
    return _said(model_config, getattr(_text(model_config), "num_hidden_layers", None), "num_hidden_layers")


def layer_sizes(model_config: PretrainedConfig, name: str) -> list[int | None]:
    """Return a setting of a model's layers for each of them; ``None`` where it has none.

    Args:
        model_config: transformers' config of a language model.
        name: of the setting, e.g. ``head_dim``.

    Raises:
        CannotEstimateError: if the model does not say how many layers it has.
    """
    text, layers = _text(model_config), layer_count(model_config)
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # of transformers 5.23, where layers differ
        return [getattr(layer, name, None) for layer in text.per_layer_config]
    return list(value) if isinstance(value, list | tuple) else [value] * layers


def largest(model_config: PretrainedConfig, name: str) -> int | None:
    """Return a setting of a model's layers, where they differ the largest; ``None`` if it has none.

    Args:
        model_config: transformers' config of a language model.
        name: of the setting, e.g. ``intermediate_size``.
    """
    return max((size for size in layer_sizes(model_config, name) if size is not None), default=None)


def required(model_config: PretrainedConfig, name: str) -> int:
    """Return what :func:`largest` does.

    Raises:
        CannotEstimateError: if the model has no such setting.
    """
    return _said(model_config, largest(model_config, name), name)


def _said(model_config: PretrainedConfig, size: int | None, name: str) -> int:
    if size is None:
        raise CannotEstimateError(
            f"the memory of a {model_config.model_type!r} model cannot be estimated, since its config has no {name}: "
            "give the generator a batch_size, and watch the memory of a short run"
        )
    return size


def _text(model_config: PretrainedConfig) -> Any:
    return model_config.get_text_config(decoder=True)


def _stored_quantization(model_config: PretrainedConfig) -> dict[str, Any] | None:
    for config in (model_config, _text(model_config)):
        stored: Any = getattr(config, "quantization_config", None)
        if stored is not None:
            return cast(dict[str, Any], stored if isinstance(stored, dict) else stored.to_dict())
    return None
