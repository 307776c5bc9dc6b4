"""Batch-invariant quantised layers of bitsandbytes, which compute the same in every mode.

To rounding: on CUDA bitsandbytes has several 4-bit kernels, and chooses by the number of tokens.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn


def make_batch_invariant(model: nn.Module) -> None:
    """Let a model's quantised layers give training, sampling and log-probs the same product, whatever the batch.

    8-bit layers multiply by their dequantised weights. LLM.int8() (arXiv 2208.07339), which bitsandbytes uses
    otherwise, rounds activations too, and picks the columns that it does not round by all rows of a batch, so that a
    log-prob would depend on what shares its batch. 4-bit layers are kept from being repacked on a CPU when a forward
    runs in eval mode (bitsandbytes 0.50), which leaves later training steps without a gradient through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            cast(Any, module).forward = MethodType(_weight_only, module)


def _weight_only(layer: Any, inputs: Tensor) -> Tensor:
    from bitsandbytes.autograd._functions import MatMul8bitFp

    if layer.weight.CB is not None:
        layer.init_8bit_state()
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        inputs = inputs.to(torch.get_autocast_dtype(device))
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    # dequantises anew in the backward pass, where a plain product would keep the whole matrix
    product: Tensor = cast(Any, MatMul8bitFp).apply(inputs, layer.weight, None, bias, layer.state)
    return product
