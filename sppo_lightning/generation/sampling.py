"""Exact sampling by inverse CDF: one uniform per token decides, whatever else is in the batch.

Shapes: B rows, V vocabulary, K candidates kept by top-k or top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (256, 2048)  # most likely tokens to sort, while the nucleus is wider than the width before


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Draw one token a row from the warped distribution: temperature, then top-k, then top-p.

    Only as many of the most likely tokens are sorted as the nucleus needs, so that nothing is lost.

    Args:
        logits: ``[B, V]``.
        uniforms: ``[B]`` draws from [0, 1).
        temperature: divides the logits; greater than 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this share, in (0, 1].

    Returns:
        ``[B]`` token ids.
    """
    scaled = logits.float() / temperature
    if top_k == 0 and top_p == 1.0:
        return _inverse_cdf(scaled.softmax(-1), uniforms)
    vocabulary = scaled.shape[-1]
    limit = min(top_k, vocabulary) if top_k else vocabulary
    normalizer = (scaled.topk(limit, dim=-1).values if top_k else scaled).logsumexp(-1)
    tokens = torch.empty(len(scaled), dtype=torch.long, device=scaled.device)
    rows = torch.arange(len(scaled), device=scaled.device)  # whose nucleus is not yet held
    for width in [limit] if top_p == 1.0 else [*(w for w in WIDTHS if w < limit), limit]:
        values, ids = scaled.topk(width, dim=-1)
        probs = (values - normalizer[:, None]).exp()
        tokens[rows] = _pick(probs, ids, uniforms, top_p)
        if width == limit:
            break
        wider = (probs.sum(-1) < top_p).nonzero().flatten()
        if not len(wider):
            break
        rows, scaled, normalizer, uniforms = (each[wider] for each in (rows, scaled, normalizer, uniforms))
    return tokens


def _pick(probs: Tensor, ids: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Draw from descending ``probs`` [B, K] cut to the nucleus."""
    before = probs.cumsum(-1) - probs
    kept = probs.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, _inverse_cdf(kept, uniforms)[:, None]).squeeze(-1)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index whose cumulated weight exceeds ``uniforms * total``, ``[B]``."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    threshold = uniforms.to(cumulated) * cumulated[:, -1]
    index = torch.searchsorted(cumulated, threshold[:, None], right=True).squeeze(-1)
    last = (weights > 0).to(torch.int8).flip(-1).argmax(-1)  # zeros after the last possible token
    return torch.minimum(index, weights.shape[-1] - 1 - last)
