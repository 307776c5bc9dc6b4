"""The Parquet store of a run: rollout shards, difficulty, pairs and the manifest of each iteration.

Files are written to a temporary name, fsynced and renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS, StatisticsTable
from sppo_lightning.types import PreferencePair, Rollout, UserError

ROLLOUT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
    ]
)
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
_COUNTS = ("estimated_iteration", "samples")
DIFFICULTY_SCHEMA = pa.schema(
    [("prompt_id", pa.string())]
    + [(name, pa.int64() if name in _COUNTS else pa.float64()) for name in DIFFICULTY_COLUMNS]
    + [("selected", pa.bool_())]
)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error


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

    def read_all(self, name: str = "*") -> Iterator[Rollout]:
        """Yield the rows of all shards of ``name``, shard by shard."""
        for path in sorted(self.folder.glob(f"{name}-*.parquet")):
            yield from read_rollouts(path)


def write_rollouts(path: Path, rows: Sequence[Rollout]) -> None:
    """Write a rollout file."""
    _write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], ROLLOUT_SCHEMA))


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the rows of a rollout file."""
    rows = _read_table(path, ROLLOUT_SCHEMA).to_pylist()
    return [Rollout(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows]


class IterationStore:
    """The folder of one self-play iteration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = ShardStore(folder / "rollouts")

    @property
    def complete(self) -> bool:
        """Whether the iteration's data is final."""
        manifest = self.read_manifest()
        return manifest is not None and bool(manifest["complete"])

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write what made the iteration."""
        write_atomically(
            self.folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True).encode()
        )

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or ``None`` before the iteration began."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): delete {self.folder} and run again") from error
        return manifest

    def write_difficulty(self, table: StatisticsTable, selected: set[str]) -> None:
        """Write one row a prompt."""
        columns: dict[str, Any] = {"prompt_id": list(table.prompt_ids)}
        for name in DIFFICULTY_COLUMNS:
            values = table[name]
            columns[name] = (values.long() if name in _COUNTS else values).tolist()
        columns["selected"] = [prompt_id in selected for prompt_id in table.prompt_ids]
        _write_table(self.folder / "difficulty.parquet", pa.table(columns, DIFFICULTY_SCHEMA))

    def read_difficulty(self) -> tuple[StatisticsTable, set[str]]:
        """Return the table and the ids of the selected prompts."""
        table = _read_table(self.folder / "difficulty.parquet", DIFFICULTY_SCHEMA)
        prompt_ids = table["prompt_id"].to_pylist()
        columns = {
            name: torch.tensor(table[name].to_pylist(), dtype=torch.float64) for name in DIFFICULTY_COLUMNS
        }
        selected = {key for key, keep in zip(prompt_ids, table["selected"].to_pylist(), strict=True) if keep}
        return StatisticsTable(tuple(prompt_ids), columns), selected

    def write_pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Write the iteration's pairs, in pair order."""
        _write_table(
            self.folder / "pairs.parquet",
            pa.Table.from_pylist([asdict(pair) for pair in pairs], PAIR_SCHEMA),
        )

    def read_pairs(self) -> list[PreferencePair]:
        """Return the iteration's pairs, in pair order."""
        ids = [field.name for field in fields(PreferencePair) if field.name.endswith("token_ids")]
        rows = _read_table(self.folder / "pairs.parquet", PAIR_SCHEMA).to_pylist()
        return [PreferencePair(**{**row, **{name: tuple(row[name]) for name in ids}}) for row in rows]


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

    Batch sizes are left out: they decide speed, not results.
    """

    def plain(value: object) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"

    public = {name: value for name, value in vars(component).items() if not name.startswith("_")}
    settings = {name: plain(value) for name, value in public.items() if name != "batch_size"}
    return {"class_path": plain(component), "init_args": settings}
