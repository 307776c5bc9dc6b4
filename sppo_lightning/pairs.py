"""An iteration's preference pairs, held in columns: four bytes a token instead of a Python object each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sppo_lightning.ragged import RaggedColumn
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
    ]
)
TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
TEXT_COLUMNS = tuple(field.name for field in PAIR_SCHEMA if field.type == pa.string())
NUMBER_COLUMNS = tuple(field.name for field in PAIR_SCHEMA if field.type == pa.float64())
CHUNK = 128  # pairs that are Python objects at once


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
        numbers = {name: array("d") for name in NUMBER_COLUMNS}
        for pair in pairs:
            for name, text in texts.items():
                text.append(getattr(pair, name).encode())
            for name, token_ids in tokens.items():
                token_ids.append(getattr(pair, name))
            for name, values in numbers.items():
                values.append(getattr(pair, name))
        ragged = {name: column.as_arrow() for name, column in {**texts, **tokens}.items()}
        return cls(pa.table({**ragged, **numbers}, PAIR_SCHEMA))

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
        return _pair(self.table.slice(row % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[PreferencePair]:
        for start in range(0, len(self), CHUNK):
            yield from map(_pair, self.table.slice(start, CHUNK).to_pylist())

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

    def with_reference(self, chosen: Sequence[float], rejected: Sequence[float]) -> PairTable:
        """Return the pairs with the reference's log-probs, in nats."""
        table = self.table
        for name, values in (("reference_chosen_logp", chosen), ("reference_rejected_logp", rejected)):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(values, pa.float64()))
        return PairTable(table)

    def kept(self, mask: Sequence[bool]) -> PairTable:
        """Return the pairs where ``mask`` is true."""
        return self if all(mask) else PairTable(self.table.filter(pa.array(mask, pa.bool_())))


def _pair(fields: Mapping[str, Any]) -> PreferencePair:
    return PreferencePair(**{**fields, **{name: tuple(fields[name]) for name in TOKEN_COLUMNS}})
