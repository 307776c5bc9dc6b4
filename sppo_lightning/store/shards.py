"""Rollout shards: a fixed list of prompts, one Parquet file each."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from sppo_lightning.difficulty import ProbeResponses
from sppo_lightning.store.rows import (
    STORED_COLUMNS,
    StoredRollout,
    TokenColumn,
    parts_of,
    stored_rollouts,
    usable_rows,
)
from sppo_lightning.store.tables import check_token_ids, read_table, row_count, write_table
from sppo_lightning.system.durable import quarantine
from sppo_lightning.types import FINISH_REASONS, Rollout, ScoredRollout

Row = TypeVar("Row", bound=ScoredRollout)


ROLLOUT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("drop_reason", pa.string()),
    ]
)


PROMPT_DIGESTS = b"prompt_digests"  # in a shard's metadata


_KEY_SCHEMA = pa.schema(
    [ROLLOUT_SCHEMA.field(name) for name in ("prompt_id", "sample_index", "reward", "drop_reason")]
)


STORED_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in STORED_COLUMNS])
"""Of what :func:`~sppo_lightning.store.rows.stored_rollouts` reads."""


_ID_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field("prompt_id")])


_PROMPT_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in ("prompt_id", "prompt")])


_REWARD_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in ("prompt_id", "reward", "drop_reason")])


_MEASURED_SCHEMA = pa.schema(
    [*_REWARD_SCHEMA, *(ROLLOUT_SCHEMA.field(name) for name in ("token_ids", "finish_reason"))]
)


class ShardStore:
    """A folder of rollout shards, ``<name>-<number>.parquet``; a shard is a fixed list of prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, number: int) -> Path:
        """Return where shard ``number`` of ``name`` lies."""
        return self.folder / f"{name}-{number:05d}.parquet"

    def quarantine_beyond(self, name: str, shards: int) -> None:
        """Quarantine shards of ``name`` from number ``shards`` on, if others were found damaged before.

        A probe that was sampled again may have changed the selection, so that fewer top-up shards are asked for.
        """
        if self.has_quarantined:
            for path in self.paths(name):
                if int(path.stem.rpartition("-")[2]) >= shards:
                    quarantine(path)

    @property
    def has_quarantined(self) -> bool:
        """Whether a shard was found damaged before."""
        return any(self.folder.glob("*.damaged*"))

    def write(
        self,
        name: str,
        number: int,
        rows: Sequence[Rollout],
        *,
        prompts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write a shard, replacing the one that is there.

        Args:
            name: of the shards, ``probe`` or ``topup``.
            number: of the shard.
            rows: the responses.
            prompts: digest of each prompt's token ids, by prompt id.
        """
        write_rollouts(self.path(name, number), rows, prompts)

    def prompt_digests(self, name: str, number: int) -> dict[str, str]:
        """Return the digests that a shard was written with; none of a shard of an older version."""
        metadata = pq.read_schema(self.path(name, number)).metadata or {}
        found: dict[str, str] = json.loads(metadata.get(PROMPT_DIGESTS, b"{}"))
        return found

    def read(self, name: str, number: int) -> list[Rollout] | None:
        """Return a shard's rows, or ``None`` if it has not been written."""
        path = self.path(name, number)
        return read_rollouts(path) if path.exists() else None

    def check(self, name: str, number: int, *, embedding_rows: int) -> None:
        """Read all of a shard, as its parts are not where only some columns are asked for.

        Args:
            name: of the shards.
            number: of the shard.
            embedding_rows: of the policy that answered: no other token ids may be there.

        Raises:
            UserError: if it is damaged.
        """
        _check_file(self.path(name, number), embedding_rows)

    def check_all(self, *, embedding_rows: int) -> None:
        """Read all of all shards, as :meth:`check` does.

        Raises:
            UserError: if one is damaged.
        """
        for path in self.paths("*"):
            _check_file(path, embedding_rows)

    def key(self, name: str, number: int) -> ShardKey | None:
        """Return what a shard holds, without its texts and tokens; ``None`` if it has not been written."""
        path = self.path(name, number)
        if not path.exists():
            return None
        table = read_table(path, _KEY_SCHEMA)
        columns = (table[column].to_pylist() for column in ("prompt_id", "sample_index"))
        reasons = table["drop_reason"].drop_null().to_pylist()
        return ShardKey(list(zip(*columns, strict=True)), table["reward"].null_count == 0, reasons)

    def count(self, name: str = "*") -> int:
        """Return the rows of all shards of ``name``, whatever is in them."""
        return sum(row_count(path) for path in self.paths(name))

    def read_all(self, name: str = "*") -> Iterator[Rollout]:
        """Yield the rows of all shards of ``name``, shard by shard."""
        for path in self.paths(name):
            yield from read_rollouts(path)

    def stream(self, name: str = "*") -> Iterator[StoredRollout]:
        """Yield the rows of all shards of ``name``, of which only what is looked at becomes objects."""
        for path in self.paths(name):
            yield from stored_rollouts(read_table(path, STORED_SCHEMA))

    def prompt_texts(self) -> dict[str, str]:
        """Return what the user says in each prompt, by prompt id."""
        found: dict[str, str] = {}
        for path in self.paths("*"):
            table = read_table(path, _PROMPT_SCHEMA)
            found.update(zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
        return found

    def rewards(self, name: str = "*") -> dict[str, array[float]]:
        """Return the rewards of the usable responses, by prompt id, in the order of the shards."""
        found: dict[str, array[float]] = {}
        for path in self.paths(name):
            table = read_table(path, _REWARD_SCHEMA)
            table = table.filter(usable_rows(table))
            for prompt_id, reward in zip(
                table["prompt_id"].to_pylist(), table["reward"].to_pylist(), strict=True
            ):
                found.setdefault(prompt_id, array("d")).append(reward)
        return found

    def difficulty_rewards(self) -> tuple[dict[str, array[float]], dict[str, array[float]]]:
        """Return the rewards that difficulties come from: the probe's, and those of prompts that were not probed.

        Not the top-up's of a probed prompt: only selected ones have them, and they were selected by their probe.
        """
        probed: set[str] = set()
        for path in self.paths("probe"):
            probed.update(read_table(path, _ID_SCHEMA)["prompt_id"].to_pylist())
        later = {name: rewards for name, rewards in self.rewards("topup").items() if name not in probed}
        return self.rewards("probe"), later

    def measured(self, name: str, prompt_ids: Sequence[str]) -> ProbeResponses:
        """Return what can be measured of the usable responses to ``prompt_ids``, packed, in that order."""
        place = {prompt_id: row for row, prompt_id in enumerate(prompt_ids)}
        prompts, rewards, lengths, codes = array("q"), array("d"), array("i"), array("b")
        for path in self.paths(name):
            table = read_table(path, _MEASURED_SCHEMA)
            table = table.filter(usable_rows(table))
            prompts.extend(place[prompt_id] for prompt_id in table["prompt_id"].to_pylist())
            rewards.extend(table["reward"].to_pylist())
            lengths.extend(pc.list_value_length(table["token_ids"]).to_pylist())
            codes.extend(FINISH_REASONS.index(reason) for reason in table["finish_reason"].to_pylist())
        rows = torch.tensor(prompts, dtype=torch.long)
        order = rows.argsort(stable=True)
        ends = rows.bincount(minlength=len(prompt_ids)).cumsum(0)
        return ProbeResponses(
            rewards=torch.tensor(rewards, dtype=torch.float64)[order],
            lengths=torch.tensor(lengths, dtype=torch.int32)[order],
            finish_codes=torch.tensor(codes, dtype=torch.int8)[order],
            starts=torch.cat([ends.new_zeros(1), ends]),
        )

    def paths(self, name: str = "*") -> list[Path]:
        """Return the files of all shards of ``name``."""
        return sorted(self.folder.glob(f"{name}-[0-9]*.parquet"))


class ShardKey(NamedTuple):
    """What a shard holds."""

    rows: list[tuple[str, int]]  # prompt id and sample index
    scored: bool
    drop_reasons: list[str]  # of the rows that were dropped


def _check_file(path: Path, embedding_rows: int) -> None:
    check_token_ids(path, read_table(path, ROLLOUT_SCHEMA), ("token_ids",), embedding_rows=embedding_rows)


def write_rollouts(
    path: Path, rows: Sequence[Rollout], prompts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a rollout file; ``prompts``: digest of each prompt's token ids, by prompt id."""
    fields = [{**vars(row), "reward_parts": list(row.reward_parts.items())} for row in rows]
    table = pa.Table.from_pylist(fields, ROLLOUT_SCHEMA)
    if prompts:
        table = table.replace_schema_metadata({PROMPT_DIGESTS: json.dumps(dict(prompts))})
    write_table(path, table)


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the rows of a rollout file."""
    table = read_table(path, ROLLOUT_SCHEMA)
    special = {"token_ids": TokenColumn(table["token_ids"]), "reward_parts": parts_of(table)}
    columns = [special[name] if name in special else table[name].to_pylist() for name in ROLLOUT_SCHEMA.names]
    return [Rollout(*fields) for fields in zip(*columns, strict=True)]


def by_prompt(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each prompt with its rows, which must be neighbours."""
    for prompt_id, group in groupby(rows, key=attrgetter("prompt_id")):
        yield prompt_id, list(group)


def merged(
    prompt_ids: Iterable[str], *sources: Iterator[tuple[str, list[Row]]]
) -> Iterator[tuple[str, list[Row]]]:
    """Yield each prompt with its rows from all ``sources``, of which one prompt is held at a time.

    Args:
        prompt_ids: all prompts that occur, in an order that every source follows.
        sources: prompts with their rows, in that order; each may lack some.
    """
    heads = [next(source, None) for source in sources]
    for prompt_id in prompt_ids:
        rows: list[Row] = []
        for number, source in enumerate(sources):
            head = heads[number]
            if head is not None and head[0] == prompt_id:
                rows += head[1]
                heads[number] = next(source, None)
        if rows:
            yield prompt_id, rows
    assert heads == [None] * len(sources), "a source does not follow the order of prompt_ids"
