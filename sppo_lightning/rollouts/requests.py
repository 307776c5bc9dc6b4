"""What a phase asks an engine for: responses to prompts, in shards."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, overload

from sppo_lightning.generation import SampleRequest
from sppo_lightning.types import EncodedPrompt


class RolloutRequest(NamedTuple):
    """Which responses to sample for one prompt."""

    prompt: EncodedPrompt
    sample_indices: range


class RolloutRequests(Sequence[RolloutRequest]):
    """Requests of many prompts; an item is made when it is asked for, so that a shard is held at a time.

    Args:
        prompts: to answer; a slice of them should be cheap.
        samples: sample indices of each.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], samples: Sequence[range]) -> None:
        assert len(prompts) == len(samples)
        self._prompts = prompts
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def responses(self) -> int:
        """Responses that are asked for."""
        return sum(map(len, self._samples))

    @overload
    def __getitem__(self, row: int) -> RolloutRequest: ...
    @overload
    def __getitem__(self, row: slice) -> RolloutRequests: ...
    def __getitem__(self, row: int | slice) -> RolloutRequest | RolloutRequests:
        if isinstance(row, slice):
            return RolloutRequests(self._prompts[row], self._samples[row])
        return RolloutRequest(self._prompts[row], self._samples[row])


class ShardRequests(Sequence[SampleRequest]):
    """Requests that are made when they are asked for, so that no more of them exist than are under way.

    Args:
        sizes: prompts of each shard, by its number.
        make: returns the request of a shard, by its number, and of a row there.
    """

    def __init__(self, sizes: Mapping[int, int], make: Callable[[int, int], SampleRequest]) -> None:
        self._make = make
        self._numbers = list(sizes)
        self._starts = list(accumulate(sizes.values(), initial=0))

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
        return self._make(*self.place(position % len(self)))

    def place(self, position: int) -> tuple[int, int]:
        """Return the shard of a request, and its row there."""
        shard = bisect_right(self._starts, position) - 1
        return self._numbers[shard], position - self._starts[shard]


def response_count(shard: Sequence[RolloutRequest]) -> int:
    """Return how many responses a shard will hold; a prompt is not made for that."""
    if isinstance(shard, RolloutRequests):
        return shard.responses
    return sum(len(item.sample_indices) for item in shard)


def prompt_digests(shard: Iterable[RolloutRequest]) -> dict[str, str]:
    """Return a digest of each prompt's token ids, by prompt id."""
    return {
        item.prompt.prompt.id: hashlib.blake2b(array("q", item.prompt.token_ids), digest_size=8).hexdigest()
        for item in shard
    }
