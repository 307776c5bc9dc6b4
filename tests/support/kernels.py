"""A flash kernel in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8  # of a head


def looped_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` documents, segment after segment.

    Query i of a segment stands in line with key i + (keys - queries); it sees ``window_size[0]`` keys to the left and
    ``window_size[1]`` to the right of that one, all for -1.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q >= int(cu_seq_q.diff().max())
    assert max_k >= int(cu_seq_k.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    left, right = window_size
    scale = WIDTH**-0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    rows = []
    for segment in range(len(cu_seq_q) - 1):
        queries = query[cu_seq_q[segment] : cu_seq_q[segment + 1]]
        keys = key[cu_seq_k[segment] : cu_seq_k[segment + 1]].repeat_interleave(group, dim=1)
        values = value[cu_seq_k[segment] : cu_seq_k[segment + 1]].repeat_interleave(group, dim=1)
        for number, one in enumerate(queries):
            line = number + len(keys) - len(queries)
            first = 0 if left < 0 else max(0, line - left)
            last = len(keys) - 1 if right < 0 else min(len(keys) - 1, line + right)
            scores = scale * torch.einsum("khd,hd->hk", keys[first : last + 1], one)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[first : last + 1]))
    return torch.stack(rows)
