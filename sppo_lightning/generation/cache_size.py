"""Bytes that a model keeps of the tokens it has read: keys and values, and the states of other layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sppo_lightning.policy.footprint import layer_sizes, required

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig


class RowBytes(NamedTuple):
    """What a sequence takes in a cache."""

    token: int  # bytes of each token; at least 1
    fixed: int  # bytes however long it is: states, and keys of windows that are full

    def tokens(self, length: int) -> int:
        """Return how many tokens take as much as a sequence of ``length`` tokens with its fixed part."""
        return length + -(-self.fixed // self.token)


def held_bytes(cache: DynamicCache) -> int:
    """Return the bytes of all that a cache's layers hold, room for later tokens aside."""
    held = (value for layer in cache.layers for name, value in vars(layer).items() if name[0] != "_")
    parts = (part for value in held for part in (value.values() if isinstance(value, dict) else [value]))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def cache_bytes(model_config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of a sequence's keys and values as a model's settings tell them.

    Layers with a window keep no more than that. Layers that keep a state instead are counted as if they attended,
    which is more from a few hundred tokens on.

    Args:
        model_config: the model's own settings.
        tokens: of prompt and response together.
        dtype: of keys and values.

    Raises:
        CannotEstimateError: if the settings do not tell.
    """
    text: Any = model_config.get_text_config(decoder=True)
    layers = _token_bytes(model_config, dtype)
    window = getattr(text, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(text, "layer_types", None) or [usual] * len(layers)
    window = tokens if window is None else window
    kept = [min(window, tokens) if kind == "sliding_attention" else tokens for kind in kinds]
    return sum(size * length for size, length in zip(layers, kept, strict=True))


def _token_bytes(model_config: PretrainedConfig, dtype: torch.dtype) -> list[int]:
    """Return the bytes that one token's keys and values take in each layer."""
    heads, sizes = layer_sizes(model_config, "num_key_value_heads"), layer_sizes(model_config, "head_dim")
    text: Any = model_config.get_text_config(decoder=True)
    if getattr(text, "global_head_dim", None):  # of Gemma 4 before transformers 5.23
        full = [kind == "full_attention" for kind in text.layer_types]
        sizes = [text.global_head_dim if there else size for there, size in zip(full, sizes, strict=True)]
    found = []
    for head_count, head_size in zip(heads, sizes, strict=True):
        count = head_count or required(model_config, "num_attention_heads")
        size = head_size or required(model_config, "hidden_size") // required(
            model_config, "num_attention_heads"
        )
        found.append(2 * count * size * dtype.itemsize)
    return found
