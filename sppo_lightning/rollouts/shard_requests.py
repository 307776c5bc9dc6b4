"""The requests of one or several shards, one after the other, as an engine is asked."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

from sppo_lightning.generation import SampleRequest


class ShardRequests(Sequence[SampleRequest]):
    """Requests that are made when they are asked for, so that no more of them exist than are under way.

    Args:
        shards: what each shard asks for, by its number.
        make: turns one of these into a request.
    """

    def __init__(self, shards: Mapping[int, Sequence[Any]], make: Callable[[Any], SampleRequest]) -> None:
        self._shards = shards
        self._make = make
        self._numbers = list(shards)
        self._starts = list(accumulate(map(len, shards.values()), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, position: int) -> SampleRequest: ...
    @overload
    def __getitem__(self, position: slice) -> list[SampleRequest]: ...
    def __getitem__(self, position: int | slice) -> SampleRequest | list[SampleRequest]:
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        number, row = self.place(position % len(self))
        return self._make(self._shards[number][row])

    def place(self, position: int) -> tuple[int, int]:
        """Return the shard of a request, and its row there."""
        shard = bisect_right(self._starts, position) - 1
        return self._numbers[shard], position - self._starts[shard]
