"""An iteration's preference pairs, held in columns: four bytes a token instead of a Python object each."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.types import PreferencePair

PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("chosen_token_ids", pa.list_(pa.int32())),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("reference_chosen_logp", pa.float64()),
        ("reference_rejected_logp", pa.float64()),
        ("chosen_win_probability", pa.float64()),
        ("rejected_win_probability", pa.float64()),
        ("chosen_sample_index", pa.int32()),
        ("rejected_sample_index", pa.int32()),
    ]
)
TOKEN_LOGPS = (
    pa.field("reference_chosen_token_logps", pa.list_(pa.float64())),
    pa.field("reference_rejected_token_logps", pa.list_(pa.float64())),
)
"""Columns that are there where the loss reads them."""
ADDED_COLUMNS = {
    "chosen_win_probability": None,
    "rejected_win_probability": None,
    "chosen_sample_index": -1,
    "rejected_sample_index": -1,
}
"""Columns that the first version did not write, and what its files read as there; ``None``: a null, read as NaN."""
TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
TEXT_COLUMNS = tuple(field.name for field in PAIR_SCHEMA if field.type == pa.string())
NUMBER_COLUMNS = tuple(field.name for field in PAIR_SCHEMA if field.type == pa.float64())
INDEX_COLUMNS = tuple(field.name for field in PAIR_SCHEMA if field.type == pa.int32())


class PairTable(Sequence[PreferencePair]):
    """Pairs by row number; a row becomes a :class:`~sppo_lightning.types.PreferencePair` when it is asked for.

    Args:
        table: with :data:`PAIR_SCHEMA`.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def collect(cls, pairs: Iterable[PreferencePair]) -> PairTable:
        """Return the table of ``pairs``, which are taken one by one."""
        texts = {name: RaggedColumn("B") for name in TEXT_COLUMNS}
        tokens = {name: RaggedColumn("i") for name in TOKEN_COLUMNS}
        numbers: dict[str, array[Any]] = {name: array("d") for name in NUMBER_COLUMNS}
        numbers |= {name: array("i") for name in INDEX_COLUMNS}
        for pair in pairs:
            for name, text in texts.items():
                text.append(getattr(pair, name).encode())
            for name, token_ids in tokens.items():
                token_ids.append(getattr(pair, name))
            for name, values in numbers.items():
                values.append(getattr(pair, name))
        ragged = {name: column.as_arrow() for name, column in {**texts, **tokens}.items()}
        nullable = {
            name: pa.array(numbers[name], from_pandas=True)  # NaN becomes null
            for name, absent in ADDED_COLUMNS.items()
            if absent is None
        }
        return cls(pa.table({**ragged, **numbers, **nullable}, PAIR_SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, row: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, row: slice) -> list[PreferencePair]: ...
    def __getitem__(self, row: int | slice) -> PreferencePair | list[PreferencePair]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} pairs")
        row %= len(self)
        fields: dict[str, Any] = {
            name: self.table[name][row].as_py() for name in TEXT_COLUMNS + NUMBER_COLUMNS + INDEX_COLUMNS
        }
        fields |= {name: math.nan for name, value in fields.items() if value is None}
        fields |= {name: self._token_ids(name, row) for name in TOKEN_COLUMNS}
        stored = [field.name for field in TOKEN_LOGPS if field.name in self.table.column_names]
        fields |= {name: tuple(self.table[name][row].as_py()) for name in stored}
        return PreferencePair(**fields)

    def __iter__(self) -> Iterator[PreferencePair]:
        return map(self.__getitem__, range(len(self)))

    def _token_ids(self, name: str, row: int) -> tuple[int, ...]:
        first_rows, chunks = self._chunks[name]
        number = bisect_right(first_rows, row) - 1
        tokens, ends = chunks[number]
        row -= first_rows[number]
        return tuple(tokens[ends[row] : ends[row + 1]].tolist())

    @cached_property
    def _chunks(self) -> dict[str, tuple[list[int], list[tuple[Any, Any]]]]:
        """Of each token column, its chunks' first rows, and each chunk's tokens and rows' ends in numpy.

        pyarrow itself would make a Python object of its own of each token first, thirty times slower.
        """
        found = {}
        for name in TOKEN_COLUMNS:
            chunks = [chunk for chunk in self.table[name].chunks if len(chunk)]
            first_rows = [0, *accumulate(map(len, chunks))]
            found[name] = (
                first_rows[:-1],
                [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in chunks],
            )
        return found

    @property
    def prompt_ids(self) -> list[str]:
        """The pairs' prompts."""
        ids: list[str] = self.table["prompt_id"].to_pylist()
        return ids

    def lengths(self, name: str) -> Tensor:
        """Return the tokens in a column of token ids, ``[pairs]``."""
        return torch.tensor(pc.list_value_length(self.table[name]).to_numpy(), dtype=torch.long)

    def tokens(self) -> Tensor:
        """Return the tokens of each pair, its prompt counted once, ``[pairs]``."""
        return torch.stack([self.lengths(name) for name in TOKEN_COLUMNS]).sum(0)

    def statistics(self) -> Mapping[str, Tensor]:
        """Return what pair rules read off the pairs alone, ``[pairs]`` float64 each; lengths in tokens."""
        columns = {
            name: torch.tensor(self.table[name].to_numpy(), dtype=torch.float64) for name in NUMBER_COLUMNS
        }
        for side in ("chosen", "rejected"):
            columns[f"{side}_length"] = self.lengths(f"{side}_token_ids").double()
        return columns

    def with_reference(
        self,
        chosen: Sequence[float],
        rejected: Sequence[float],
        tokens: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None,
    ) -> PairTable:
        """Return the pairs with the reference's log-probs of responses, and of their tokens, in nats."""
        table = self.table
        for name, values in (("reference_chosen_logp", chosen), ("reference_rejected_logp", rejected)):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(values, pa.float64()))
        for field, rows in zip(TOKEN_LOGPS, tokens or (), strict=False):
            table = table.append_column(field, pa.array(rows, field.type))
        return PairTable(table)

    def kept(self, mask: Sequence[bool]) -> PairTable:
        """Return the pairs where ``mask`` is true."""
        return self if all(mask) else PairTable(self.table.filter(pa.array(mask, pa.bool_())))
