"""Log-probabilities of given tokens, without a float32 copy of the logits.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sppo_lightning.losses import PairLogps

CHUNK_ELEMENTS = 1 << 25  # logits held in float32 at once (128 MiB), unless the caller says otherwise


class _TokenLogps(torch.autograd.Function):
    """``log_softmax(logits)[target]`` in float32, chunk by chunk; the softmax is recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        # logits [N, V], targets [N]
        out_dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.empty(len(logits), dtype=out_dtype, device=logits.device)
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            normalizer[rows] = logits[rows].to(out_dtype).logsumexp(-1)
        picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).to(out_dtype)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.chunk = chunk
        return picked - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs  # [N]
        logits, targets, normalizer = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            softmax = (logits[rows].to(normalizer.dtype) - normalizer[rows, None]).exp_()
            softmax.mul_(-grad[rows, None])
            softmax.scatter_add_(-1, targets[rows, None], grad[rows, None].to(softmax.dtype))
            grad_logits[rows] = softmax.to(logits.dtype)
        return grad_logits, None, None


def token_logps(logits: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of each target token, in float32 (float64 for float64 logits).

    Args:
        logits: ``[N, V]``, any floating dtype.
        targets: ``[N]`` token ids.
        chunk: positions whose logits are held in float32 at once; ``None``: what 128 MiB hold.
    """
    logps: Tensor = cast(Any, _TokenLogps).apply(logits, targets, _chunk_of(logits, chunk))
    return logps


def collision_entropy(logits: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return -log Σ p² at each position, ``[N]``, nats, in float32 (float64 for float64 logits); no gradient.

    Rényi's entropy of order 2: two tokens sampled at a position are the same with probability Σ p².

    Args:
        logits: ``[N, V]``, any floating dtype.
        chunk: positions whose logits are held in float32 at once; ``None``: what 128 MiB hold.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.no_grad():
        parts = (part.to(dtype) for part in torch.split(logits, _chunk_of(logits, chunk)))
        found = [2 * part.logsumexp(-1) - (2 * part).logsumexp(-1) for part in parts]
    return torch.cat(found)


def _chunk_of(logits: Tensor, chunk: int | None) -> int:
    if chunk is None:
        return max(1, CHUNK_ELEMENTS // logits.shape[-1])
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    return chunk


def by_response(logps: Tensor, places: Tensor, responses: int, longest: int) -> Tensor:
    """Return token log-probs by response, ``[responses, longest]``, 0 after its end; float64 where the device has it.

    Args:
        logps: ``[N]`` log-probs of all response tokens, nats.
        places: ``[N]`` place of each in ``responses`` x ``longest``; no place twice.
        responses: number of responses.
        longest: tokens of the longest one.
    """
    dtype = torch.float32 if logps.device.type == "mps" else torch.float64
    padded = torch.zeros(responses * longest, dtype=dtype, device=logps.device)
    return padded.index_copy(0, places, logps.to(dtype)).view(responses, longest)


def summed(tokens: PairLogps) -> PairLogps:
    """Return the log-probs of responses, ``[B]`` each, given those of their tokens, ``[B, T]`` each."""
    return PairLogps(tokens.chosen.sum(-1), tokens.rejected.sum(-1))
