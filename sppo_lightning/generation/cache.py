"""A key-value cache that is written in place.

transformers' ``DynamicCache`` concatenates: each new token copies all that came before, which is most of the time
of decoding on a CPU. Shapes: B rows, H key-value heads, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

from torch import LongTensor, Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

RESERVE = 256  # tokens of room made at once


class ReservedLayer(DynamicLayer):
    """Full attention's keys and values ``[B, H, T, D]``, as views of a buffer with room to grow."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None
        assert self.values is not None
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < stop:
            self._buffers = (self._reserved(self.keys, stop), self._reserved(self.values, stop))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _reserved(tokens: Tensor, length: int) -> Tensor:
        rows, heads, have, size = tokens.shape
        buffer = tokens.new_empty(rows, heads, length + RESERVE, size)
        buffer[:, :, :have] = tokens
        return buffer

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Keep the rows at ``beam_idx``, which may name one several times."""
        super().reorder_cache(beam_idx)
        self._buffers = None

    def move(self, source: Tensor) -> None:
        """Let each row have its tokens at other places.

        Args:
            source: ``[B, T]`` present place of each token.
        """
        assert self.keys is not None
        assert self.values is not None
        index = source[:, None, :, None]
        self.keys, self.values = (
            states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (self.keys, self.values)
        )
        self._buffers = None


def reserved_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model; layers other than full attention are transformers' own."""
    cache = DynamicCache(config=config)
    reserved: Any = ReservedLayer
    cache.layers = [reserved() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
