"""Rows of different lengths, end to end in one array: a row costs its numbers, and growing copies nothing twice.

Why not Arrow arrays, 256 rows at a time: an array of Arrow does not grow, so that rows wait as Python objects until
one is made of them, and a row comes out through an object of its own. Measured with 100,000 prompts of 60 words and
80 tokens: reading them takes 107 MB instead of 48, encoding a third longer, going through them or looking them up by
id twice as long, collecting pairs one and a half times; it would save some 20 lines. ``datasets`` holds its rows in
such arrays too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

CHUNK_VALUES = 2**31 - 1  # most that the 32-bit offsets of an Arrow chunk reach


class RaggedColumn:
    """Rows of bytes, or of token ids.

    Args:
        typecode: ``B`` for bytes, ``i`` for token ids.
    """

    def __init__(self, typecode: Literal["B", "i"]) -> None:
        self._values: array[int] = array(typecode)
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, row: bytes | Sequence[int]) -> None:
        """Add a row."""
        self._values.extend(array(self._values.typecode, row))
        self._ends.append(len(self._values))

    def __getitem__(self, row: int) -> array[int]:
        return self._values[self._ends[row] : self._ends[row + 1]]

    def as_arrow(self) -> pa.ChunkedArray:
        """Return the rows as texts (bytes, UTF-8) or as lists of int32, without a copy; nothing may be added after."""
        chunks, start = [], 0
        while start < len(self):
            stop = bisect_right(self._ends, self._ends[start] + CHUNK_VALUES) - 1
            assert stop > start, "a row is longer than a chunk may be"
            chunks.append(self._arrow_chunk(start, stop))
            start = stop
        return pa.chunked_array(chunks, pa.string() if self._values.typecode == "B" else pa.list_(pa.int32()))

    def _arrow_chunk(self, start: int, stop: int) -> pa.Array:
        first, last = self._ends[start], self._ends[stop]
        offsets = pa.py_buffer(array("i", (end - first for end in self._ends[start : stop + 1])))
        values = pa.py_buffer(memoryview(self._values)[first:last])
        if self._values.typecode == "B":
            return pa.StringArray.from_buffers(stop - start, offsets, values)
        return pa.ListArray.from_arrays(
            pa.Int32Array.from_buffers(pa.int32(), stop - start + 1, [None, offsets]),
            pa.Int32Array.from_buffers(pa.int32(), last - first, [None, values]),
        )
