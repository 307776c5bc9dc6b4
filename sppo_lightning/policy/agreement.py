"""Do two computations of the same log-probs agree, up to what rounding explains: what every parity check compares by.

A check makes its two sides in a way of its own; how far they lie apart, and how far they may, is said here. Kernels
that are both sound differ by roundings of the logits, and by what layers make of earlier roundings: the second is
measured on the model at hand, its embeddings off by a rounding (``policy.rounding.off_by_a_rounding``), and handed to
:meth:`Agreement.allowing`.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sppo_lightning.policy.anatomy import unwrapped


class Tolerance(NamedTuple):
    """Mean distance of two log-probs of a token that rounding explains, nats."""

    least: float  # of a model at hand, whose own roundings widen it
    stored: float  # of one forward's sums, read from the store: all that can be known


# Measured on a CPU: tiny models of some thirty kinds, and SmolLM2-135M, whose 30 layers make more of a rounding.
TOLERANCES = {
    # 1e-15 of tiny models; a single product in float32 makes more than 1e-9 of it
    torch.float64: Tolerance(1e-9, 1e-9),
    # 2e-7 to 1e-6 of tiny models, 6e-6 of the 135M one, and more of wider ones, whose sums are longer; a reference was
    # read by the policy's own forward, which leaves nothing but the composition of a batch
    torch.float32: Tolerance(1e-4, 1e-5),
    # 0 to 0.04 of tiny models, 0.05 to 0.08 of the 135M one, where a batch's rows in the wrong order make 0.17: one
    # number for all would hide a leak or refuse a model, hence its own roundings; 0.001 is for logits below 0.3
    torch.bfloat16: Tolerance(1e-3, 0.05),
    # 0 to 0.002 and 0.01 of the same models, of an eighth of bfloat16's spacing
    torch.float16: Tolerance(1e-3, 0.02),
}
TF32 = torch.float16  # float32 products of a GPU that round as float16 does


class Agreement(NamedTuple):
    """How far two computations lie apart, and how far they may; nats per token on average."""

    drift: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two agree; NaN does not."""
        return self.drift <= self.tolerance

    def allowing(self, other: float) -> Agreement:
        """Return the agreement where as much as ``other`` is explained."""
        return self._replace(tolerance=max(self.tolerance, other))

    def __str__(self) -> str:
        return f"{self.drift:.2g} nat per token (tolerance {self.tolerance:.2g})"


def distance(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute difference of two tensors of log-probs, nats."""
    return float((one - other).abs().mean())


def compare_logps(one: Tensor, other: Tensor, *, best_logits: Tensor, dtype: torch.dtype) -> Agreement:
    """Compare the log-probs of the same tokens.

    Logits that are rounded to a spacing of ``eps`` move each log-prob by a quarter of ``eps`` times their size on
    average; twice that is allowed.

    Args:
        one: ``[N]``, nats.
        other: ``[N]``.
        best_logits: ``[N]``, the largest at each token's place.
        dtype: that they were computed in.
    """
    dtype = coarsest(dtype, one.dtype, other.dtype)
    roundings = torch.finfo(dtype).eps / 2 * best_logits.abs().mean().item()
    return Agreement(distance(one, other), TOLERANCES[dtype].least).allowing(roundings)


def compare_logits(own: Tensor, other: Tensor, *, dtype: torch.dtype) -> Agreement:
    """Compare the log-probs of the tokens that the first holds most likely.

    Args:
        own: ``[..., V]`` logits.
        other: of the same places.
        dtype: that they were computed in.
    """
    best, tokens = own.max(-1, keepdim=True)
    logps = [logits.log_softmax(-1).gather(-1, tokens) for logits in (own, other)]
    return compare_logps(*logps, best_logits=best, dtype=dtype)


def compare_stored_sums(one: Tensor, other: Tensor, *, tokens: int, dtype: torch.dtype) -> Agreement:
    """Compare the log-probs of whole responses.

    Args:
        one: nats, of any shape.
        other: of the same shape.
        tokens: of all these responses.
        dtype: that they were computed in.
    """
    return Agreement(float((one - other).abs().sum()) / tokens, TOLERANCES[dtype].stored)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def product_dtype(model: nn.Module) -> torch.dtype:
    """Return the coarsest dtype that a model multiplies in, outside of an autocast."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    config: Any = unwrapped(model).config
    quantization: Any = getattr(config, "quantization_config", None)
    if getattr(quantization, "load_in_4bit", False):
        dtypes.add(quantization.bnb_4bit_compute_dtype)
    elif quantization is not None:
        dtypes.add(torch.float16)  # what bitsandbytes casts the input of 8-bit layers to
    on_cuda = next(model.parameters()).is_cuda
    if on_cuda and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(TF32)
    return coarsest(*dtypes)
