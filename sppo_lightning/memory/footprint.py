"""Bytes that weights take, from their shapes alone: a model on the meta device is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sppo_lightning.adapters import unwrapped

MatrixBytes = Callable[[int, int], int]
"""Bytes of a quantised matrix, given its outputs and inputs."""

# how bitsandbytes 0.50 holds 4-bit weights: scales and the tables that codes are looked up in, per matrix
NF4_BLOCK, NF4_TABLE = 64, 16 * 4
SCALE_BLOCK, SCALE_TABLE = 256, 256 * 4 + 4


class Footprint(NamedTuple):
    """What the weights of a model take."""

    frozen: int  # bytes of weights that are not trained, and of buffers
    trained: int  # bytes of weights that are trained
    trained_count: int  # weights that are trained
    widest: int  # bytes of the largest quantised matrix once it is dequantised; 0: none is quantised

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.frozen + self.trained


def footprint(model: nn.Module, matrix_bytes: MatrixBytes | None = None) -> Footprint:
    """Return what a model's weights take; shared weights count once.

    Args:
        model: a transformers model, PEFT's wrapper around it or not, on any device; not quantised itself.
        matrix_bytes: of each matrix that transformers would quantise; ``None``: it is held as it is.
    """
    quantized: dict[int, int] = {}
    widest = 0
    if matrix_bytes is not None:
        for weight, outputs in _quantizable(unwrapped(model)):
            quantized[id(weight)] = matrix_bytes(outputs, weight.numel() // outputs)
            widest = max(widest, weight.nbytes)
    frozen = sum(buffer.nbytes for buffer in model.buffers())
    trained = count = 0
    for parameter in model.parameters():
        size = quantized.get(id(parameter), parameter.nbytes)
        if parameter.requires_grad:
            trained += size
            count += parameter.numel()
        else:
            frozen += size
    return Footprint(frozen, trained, count, widest)


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


def _quantizable(model: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield each matrix that transformers hands to bitsandbytes, and its outputs."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    adapted = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "")
        if any(bare.startswith(prefix) for prefix in adapted):
            continue  # the adapter's own matrices
        if isinstance(module, Conv1D) and should_convert_module(bare, kept):
            yield module.weight, module.weight.shape[1]
        elif type(module) is nn.Linear and should_convert_module(bare, kept):
            yield module.weight, module.out_features
