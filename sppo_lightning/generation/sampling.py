"""Exact sampling by inverse CDF: one uniform per token decides, whatever else is in the batch.

Shapes: B rows, V vocabulary, K candidates kept by top-k or top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 256  # tokens sorted before falling back to the whole vocabulary


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Draw one token a row from the warped distribution: temperature, then top-k, then top-p.

    The nucleus is cut from the most likely tokens only; rows whose nucleus is wider are sorted in full, so
    that the result is exact.

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
    width = min(limit, CANDIDATES) if top_p < 1.0 else limit
    values, ids = scaled.topk(width, dim=-1)
    if top_k:
        normalizer = (values if width == limit else scaled.topk(limit, dim=-1).values).logsumexp(-1)
    else:
        normalizer = scaled.logsumexp(-1)
    probs = (values - normalizer[:, None]).exp()
    if width < limit and bool((wide := probs.sum(-1) < top_p).any()):
        tokens = torch.empty(len(scaled), dtype=torch.long, device=scaled.device)
        order_values, order_ids = scaled[wide].topk(limit, dim=-1)
        wide_probs = (order_values - normalizer[wide, None]).exp()
        tokens[wide] = _pick(wide_probs, order_ids, uniforms[wide], top_p)
        tokens[~wide] = _pick(probs[~wide], ids[~wide], uniforms[~wide], top_p)
        return tokens
    return _pick(probs, ids, uniforms, top_p)


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
