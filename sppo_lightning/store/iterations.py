"""The Parquet store of a run: rollout shards, difficulty, pairs and the manifest of each iteration."""

from __future__ import annotations

from abc import ABCMeta
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS, StatisticsTable
from sppo_lightning.store.pairs import PAIR_SCHEMA, PairTable
from sppo_lightning.store.reference_parts import ReferenceParts
from sppo_lightning.store.rows import (
    STORED_COLUMNS,
    StoredRollout,
    TokenColumn,
    parts_of,
    stored_rollouts,
    usable_rows,
)
from sppo_lightning.system.durable import disk_error, replacing, sealed, unsealed, write_atomically
from sppo_lightning.types import Rollout, ScoredRollout, UserError, first_line

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
FREE_SETTINGS = {
    *("batch_size", "batch_tokens", "between_phases", "gpu_memory_utilization"),
    *("base_url", "api_key_env", "max_concurrency", "timeout", "max_retries"),
}
"""Settings of generators and rewards that decide speed or place, not results."""
_KEY_SCHEMA = pa.schema(
    [ROLLOUT_SCHEMA.field(name) for name in ("prompt_id", "sample_index", "reward", "drop_reason")]
)
_STORED_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in STORED_COLUMNS])
_REWARD_SCHEMA = pa.schema([ROLLOUT_SCHEMA.field(name) for name in ("prompt_id", "reward", "drop_reason")])
_COUNTS = ("estimated_iteration", "samples")
ROWS_IN_WRITING = 1024  # of a table, held a second time, encoded
DIFFICULTY_SCHEMA = pa.schema(
    [("prompt_id", pa.string())]
    + [(name, pa.int64() if name in _COUNTS else pa.float64()) for name in DIFFICULTY_COLUMNS]
    + [("selected", pa.bool_())]
)


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as file:
        pq.write_table(
            table, file, compression="zstd", write_page_checksum=True, row_group_size=ROWS_IN_WRITING
        )


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Return the columns of ``schema``.

    Raises:
        UserError: if the file is damaged.
        OSError: if the disk does not let it be read, which says nothing about the file.
    """
    try:
        table = pq.read_table(
            path,
            columns=schema.names,
            partitioning=None,
            page_checksum_verification=True,
            pre_buffer=False,  # it would keep the file in memory beside the table
        )
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        if disk_error(error, path) is not None:
            raise
        what = "gone" if isinstance(error, FileNotFoundError) else f"damaged ({first_line(error)})"
        raise UserError(
            f"{path} is {what}: restore it from a copy, or give the same command again, which "
            "keeps it aside and makes it anew if its iteration has not been trained on"
        ) from error


def _row_count(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return 0  # damaged: as good as gone


class ShardStore:
    """A folder of rollout shards, ``<name>-<number>.parquet``; a shard is a fixed list of prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, number: int) -> Path:
        """Return where shard ``number`` of ``name`` lies."""
        return self.folder / f"{name}-{number:05d}.parquet"

    def write(self, name: str, number: int, rows: Sequence[Rollout]) -> None:
        """Write a shard, replacing the one that is there."""
        write_rollouts(self.path(name, number), rows)

    def read(self, name: str, number: int) -> list[Rollout] | None:
        """Return a shard's rows, or ``None`` if it has not been written."""
        path = self.path(name, number)
        return read_rollouts(path) if path.exists() else None

    def check(self, name: str, number: int) -> None:
        """Read all of a shard, as its parts are not where only some columns are asked for.

        Raises:
            UserError: if it is damaged.
        """
        _read_table(self.path(name, number), ROLLOUT_SCHEMA)

    def check_all(self) -> None:
        """Read all of all shards.

        Raises:
            UserError: if one is damaged.
        """
        for path in self._paths("*"):
            _read_table(path, ROLLOUT_SCHEMA)

    def key(self, name: str, number: int) -> ShardKey | None:
        """Return what a shard holds, without its texts and tokens; ``None`` if it has not been written."""
        path = self.path(name, number)
        if not path.exists():
            return None
        table = _read_table(path, _KEY_SCHEMA)
        columns = (table[column].to_pylist() for column in ("prompt_id", "sample_index"))
        reasons = table["drop_reason"].drop_null().to_pylist()
        return ShardKey(list(zip(*columns, strict=True)), table["reward"].null_count == 0, reasons)

    def count(self, name: str = "*") -> int:
        """Return the rows of all shards of ``name``, whatever is in them."""
        return sum(_row_count(path) for path in self._paths(name))

    def read_all(self, name: str = "*") -> Iterator[Rollout]:
        """Yield the rows of all shards of ``name``, shard by shard."""
        for path in self._paths(name):
            yield from read_rollouts(path)

    def stream(self, name: str = "*") -> Iterator[StoredRollout]:
        """Yield the rows of all shards of ``name``, of which only what is looked at becomes objects."""
        for path in self._paths(name):
            yield from stored_rollouts(_read_table(path, _STORED_SCHEMA))

    def rewards(self, name: str = "*") -> dict[str, array[float]]:
        """Return the rewards of the usable responses, by prompt id, in the order of the shards."""
        found: dict[str, array[float]] = {}
        for path in self._paths(name):
            table = _read_table(path, _REWARD_SCHEMA)
            table = table.filter(usable_rows(table))
            for prompt_id, reward in zip(
                table["prompt_id"].to_pylist(), table["reward"].to_pylist(), strict=True
            ):
                found.setdefault(prompt_id, array("d")).append(reward)
        return found

    def _paths(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-[0-9]*.parquet"))


class ShardKey(NamedTuple):
    """What a shard holds."""

    rows: list[tuple[str, int]]  # prompt id and sample index
    scored: bool
    drop_reasons: list[str]  # of the rows that were dropped


def write_rollouts(path: Path, rows: Sequence[Rollout]) -> None:
    """Write a rollout file."""
    fields = [{**vars(row), "reward_parts": list(row.reward_parts.items())} for row in rows]
    _write_table(path, pa.Table.from_pylist(fields, ROLLOUT_SCHEMA))


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the rows of a rollout file."""
    table = _read_table(path, ROLLOUT_SCHEMA)
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


class IterationStore:
    """The folder of one self-play iteration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = ShardStore(folder / "rollouts")
        self.reference_parts = ReferenceParts(folder / "reference")

    @property
    def complete(self) -> bool:
        """Whether the iteration's data is final."""
        manifest = self.read_manifest()
        return manifest is not None and bool(manifest["complete"])

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write what made the iteration."""
        write_atomically(self.folder / "manifest.json", sealed(manifest))

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or ``None`` before the iteration began."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            return unsealed(path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}), and nothing else says which policy gave these rollouts: restore it "
                f"from a copy; if iteration {self.folder.name} has not been trained on, you can rename {self.folder} "
                "and run again"
            ) from error

    @property
    def pruned(self) -> bool:
        """Whether the iteration's responses are gone, or about to be."""
        manifest = self.read_manifest()
        return manifest is not None and bool(manifest.get("pruned"))

    def mark_pruned(self) -> None:
        """Say in the manifest that the iteration's responses are not all there any more."""
        if not self.pruned:
            self.write_manifest({**(self.read_manifest() or {}), "pruned": True})

    def kept_shards(self) -> ShardStore:
        """Return the iteration's responses.

        Raises:
            UserError: if they were deleted.
        """
        if self.pruned:
            raise UserError(
                f"{self.shards.folder} was deleted to save space, but this run goes on from there: continue from the "
                "run's own checkpoints/last.ckpt, or start anew with a larger data.keep_iterations"
            )
        return self.shards

    def write_difficulty(self, table: StatisticsTable, selected: set[str]) -> None:
        """Write one row a prompt."""
        columns: dict[str, Any] = {"prompt_id": list(table.prompt_ids)}
        for name in DIFFICULTY_COLUMNS:
            values = table[name]
            columns[name] = (values.long() if name in _COUNTS else values).numpy()
        columns["selected"] = [prompt_id in selected for prompt_id in table.prompt_ids]
        _write_table(self.folder / "difficulty.parquet", pa.table(columns, DIFFICULTY_SCHEMA))

    def read_difficulty(self) -> tuple[StatisticsTable, set[str]]:
        """Return the table and the ids of the selected prompts."""
        table = _read_table(self.folder / "difficulty.parquet", DIFFICULTY_SCHEMA)
        prompt_ids = table["prompt_id"].to_pylist()
        columns = {
            name: torch.tensor(table[name].to_numpy(), dtype=torch.float64) for name in DIFFICULTY_COLUMNS
        }
        selected = {key for key, keep in zip(prompt_ids, table["selected"].to_pylist(), strict=True) if keep}
        return StatisticsTable(tuple(prompt_ids), columns), selected

    def write_pairs(self, pairs: PairTable) -> None:
        """Write the iteration's pairs, in pair order."""
        _write_table(self.folder / "pairs.parquet", pairs.table)

    def read_pairs(self) -> PairTable:
        """Return the iteration's pairs, in pair order."""
        return PairTable(_read_table(self.folder / "pairs.parquet", PAIR_SCHEMA))


class RunFolder:
    """Where the files of a run lie."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def iteration(self, number: int) -> IterationStore:
        """Return the store of self-play iteration ``number``."""
        return IterationStore(self.root / "iterations" / f"{number:03d}")

    def evaluation(self, name: str) -> Path:
        """Return the folder of a held-out evaluation."""
        return self.root / "evaluations" / name


def describe(component: object) -> dict[str, Any]:
    """Return a component's class and public settings as JSON types, for a manifest.

    :data:`FREE_SETTINGS` are left out; components inside are described too.
    """
    public = {name: value for name, value in vars(component).items() if not name.startswith("_")}
    settings = {name: _plain(value) for name, value in public.items() if name not in FREE_SETTINGS}
    return {"class_path": _plain_name(component), "init_args": settings}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(type(value), ABCMeta) and not isinstance(value, torch.nn.Module):
        return describe(value)
    return _plain_name(value)


def _plain_name(value: object) -> str:
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
