"""A shard's responses as they lie in their file: numbers at once, a text or its tokens when a row is asked for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sppo_lightning.types import FinishReason

STORED_COLUMNS = (
    *("prompt_id", "sample_index", "response", "token_ids"),
    *("finish_reason", "reward", "reward_parts", "drop_reason"),
)
"""What :func:`stored_rollouts` reads: all but the prompts' texts, the longest column that nothing needs."""


class StoredRollout(NamedTuple):
    """One response to one prompt, see :class:`~sppo_lightning.types.ScoredRollout`."""

    prompt_id: str
    sample_index: int
    finish_reason: FinishReason
    reward: float | None
    reward_parts: Mapping[str, float]
    drop_reason: str | None
    usable: bool
    length: int
    row: int
    texts: pa.StringArray
    tokens: TokenColumn

    @property
    def response(self) -> str:
        """The response's text."""
        text: str = self.texts[self.row].as_py()
        return text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The response's tokens."""
        return self.tokens[self.row]


class TokenColumn:
    """Lists of token ids in numpy: pyarrow itself makes an object of its own of each token first."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self._tokens: Any = lists.values.to_numpy()
        self._ends: list[int] = lists.offsets.to_pylist()

    def __getitem__(self, row: int) -> tuple[int, ...]:
        return tuple(self._tokens[self._ends[row] : self._ends[row + 1]].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(self.__getitem__, range(len(self._ends) - 1))

    @property
    def lengths(self) -> Iterable[int]:
        """The tokens of each row."""
        return (end - start for start, end in pairwise(self._ends))


def stored_rollouts(table: pa.Table) -> Iterator[StoredRollout]:
    """Yield a shard's responses; ``table`` has the :data:`STORED_COLUMNS`."""
    tokens = TokenColumn(table["token_ids"])
    texts = table["response"].combine_chunks()
    numbers = (table[name].to_pylist() for name in ("prompt_id", "sample_index", "finish_reason", "reward"))
    rest = (parts_of(table), table["drop_reason"].to_pylist(), usable_rows(table).to_pylist(), tokens.lengths)
    for row, fields in enumerate(zip(*numbers, *rest, strict=True)):
        yield StoredRollout._make((*fields, row, texts, tokens))


def parts_of(table: pa.Table) -> list[dict[str, float]]:
    """Return what each reward is made of."""
    maps = table["reward_parts"].combine_chunks()
    names, values, ends = maps.keys.to_pylist(), maps.items.to_pylist(), maps.offsets.to_pylist()
    return [dict(zip(names[start:end], values[start:end], strict=True)) for start, end in pairwise(ends)]


def usable_rows(table: pa.Table) -> pa.ChunkedArray:
    """Return where a response takes part in difficulty and pairing."""
    finite = pc.fill_null(pc.is_finite(table["reward"]), False)
    return pc.and_(pc.is_null(table["drop_reason"]), finite)
