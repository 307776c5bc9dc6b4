"""Decoding steps of a token each: the model's forward passes after the prompts.

Shapes: P prompts, B rows (active sequences), T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sppo_lightning.generation.cache import ReservedLayer
from sppo_lightning.policy.anatomy import unwrapped

WORTH_SHARING = 8  # tokens from which on a pass more pays


class DecodingSteps(ABC):
    """What rows have read so far, and how they read on; use it as a context."""

    @abstractmethod
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append a token to each row, and return the logits of the next one, ``[B, V]`` float32, until the next call.

        Args:
            tokens: ``[B]`` token ids.
            positions: ``[B]`` places of the tokens in their rows, padding not counted.
        """

    @abstractmethod
    def worth_compacting(self, active: int, rows: int) -> bool:
        """Whether to compact to the active rows, so many of so many."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Compact to some rows, ``[B]`` in ascending order."""

    def __enter__(self) -> DecodingSteps:
        return self

    def __exit__(self, *args: object) -> None:
        """Free what the steps took."""


class PlainSteps(DecodingSteps):
    """The model's own forward, on a cache that grows.

    Args:
        model: to sample from.
        cache: holds the prompts' keys and values; it is used up.
        source: ``[B]`` prompt of each row.
        mask: ``[P, T + tokens to come]``, 1 where a prompt has a token, 0 elsewhere.
        width: T.
    """

    COMPACT_BELOW = 0.75  # share of active rows under which the others are compacted away

    def __init__(
        self, model: nn.Module, cache: DynamicCache, source: Tensor, mask: Tensor, width: int
    ) -> None:
        cache.reorder_cache(cast(Any, source))
        self._model = model
        self._cache = cache
        self._mask = mask[source]
        self._seen = width

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the next token, ``[B, V]`` float32."""
        self._mask[:, self._seen] = 1
        self._seen += 1
        return read(
            self._model, tokens[:, None], self._mask[:, : self._seen], positions[:, None], self._cache
        )

    def worth_compacting(self, active: int, rows: int) -> bool:
        """Whether a quarter of the rows is done."""
        return active < self.COMPACT_BELOW * rows

    def keep(self, rows: Tensor) -> None:
        """Compact to some rows."""
        self._cache.reorder_cache(cast(Any, rows))
        self._mask = self._mask[rows]


def left_padded(
    prompts: Sequence[Sequence[int]], more: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts of token ids in one batch, padded in front.

    Args:
        prompts: P of them.
        more: tokens that will follow each.
        device: where to put them.

    Returns:
        Token ids ``[P, T]``; a mask ``[P, T + more]``, 1 where a prompt has a token; positions ``[P, T]``.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width + more, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) : width] = 1
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def read_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: DynamicCache,
    *,
    shares_prefix: bool,
) -> Tensor:
    """Read prompts into an empty cache, what all of them begin with only once; return the logits after each.

    A chat template's system prompt is often half of a short prompt. What the cache holds then is where it would be if
    each prompt had been read by itself.

    Args:
        model: a causal language model.
        prompts: P of them.
        tokens: ``[P, T]``, as :func:`left_padded` returns them.
        mask: ``[P, T]``, the same.
        positions: ``[P, T]``, the same.
        cache: empty.
        shares_prefix: whether the model may, see :class:`~.batched_decoding.Batching`.

    Returns:
        ``[P, V]`` float32.
    """
    shared = common_prefix(prompts) if shares_prefix and len(prompts) > 1 else 0
    if shared < WORTH_SHARING:
        return read(model, tokens, mask, positions, cache)
    width, device = tokens.shape[1], tokens.device
    places = torch.arange(width, device=device)
    start = torch.tensor([prompts[0][:shared]], device=device)
    read(model, start, torch.ones_like(start), places[None, :shared], cache)
    cache.reorder_cache(cast(Any, torch.zeros(len(prompts), dtype=torch.long, device=device)))
    padding = width - mask.sum(-1, keepdim=True)  # [P, 1]
    # the padding lies behind the shared tokens for now
    held = (places < shared) | (places >= shared + padding)
    logits = read(model, tokens[:, shared:], held.to(mask.dtype), positions[:, shared:], cache)
    source = torch.where(
        places < padding, places + shared, torch.where(places < padding + shared, places - padding, places)
    )
    for layer in cache.layers:
        cast(ReservedLayer, layer).move(source)
    return logits


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, less than the shortest one has."""
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # of all, these two differ soonest
    same = next(
        (n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return min(same, min(map(len, prompts)) - 1)


def read(
    model: nn.Module, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **options: Any
) -> Tensor:
    """Let a model read tokens, and return the logits after the last of them, ``[rows, V]`` float32.

    Args:
        model: a causal language model.
        tokens: ``[rows, T]`` token ids.
        mask: as the model takes it.
        positions: ``[rows, T]``.
        cache: of what was read before; these tokens are added.
        options: what else the model hands on to its layers.
    """
    output = cast(Any, model)(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{_cache_argument(unwrapped(model).__class__): cache},
        **options,
    )
    last: Tensor = output.logits[:, -1]
    return last.to(torch.float32)


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    """Return what models of a kind call their cache; those of states alone have another name for it."""
    return (
        "cache_params" if "cache_params" in inspect.signature(kind.forward).parameters else "past_key_values"
    )
