"""The Parquet store of a run: rollout shards, difficulty, pairs and the manifest of each iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS, StatisticsTable
from sppo_lightning.store.pairs import ADDED_COLUMNS, PAIR_SCHEMA, TOKEN_LOGPS, PairTable
from sppo_lightning.store.reference_parts import ReferenceParts
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.store.tables import read_table, write_table
from sppo_lightning.system.durable import read_checksummed, with_checksum, write_atomically
from sppo_lightning.types import UserError

_COUNTS = ("estimated_iteration", "samples")
DIFFICULTY_SCHEMA = pa.schema(
    [("prompt_id", pa.string())]
    + [(name, pa.int64() if name in _COUNTS else pa.float64()) for name in DIFFICULTY_COLUMNS]
    + [("selected", pa.bool_())]
)

MANIFEST: dict[str, Any] = {
    "complete": bool,
    "counts": dict,
    "dropped": dict,
    "iteration": int,
    "metrics": dict,
    "pruned": bool,
    "responses": dict,
    "rule_states": dict,
    "smoothing": (int, float),
}
"""Types of what is read of a manifest."""
NUMBERS = ("counts", "dropped", "metrics")


class _Manifest(dict[str, Any]):
    """A manifest as it was read: a key that it lacks is the user's error, as other damage is.

    Args:
        content: of the file.
        path: of the file.
    """

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        super().__init__(
            {
                name: _Manifest(value, path) if isinstance(value, dict) else value
                for name, value in content.items()
            }
        )
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise _damaged(self.path, f"it lacks {key!r}")


def _wrong_types(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a manifest whose values are of another type than is written."""
    for name, kind in MANIFEST.items():
        value = manifest.get(name)
        numbers = value.values() if name in NUMBERS and isinstance(value, dict) else ()
        wrong = not isinstance(value, kind) or not all(isinstance(number, int | float) for number in numbers)
        if name in manifest and wrong:
            yield name


def _damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"{path} is damaged ({why}), and nothing else says which policy gave these rollouts: restore it from a copy; "
        f"if iteration {path.parent.name} has not been trained on, you can rename {path.parent} and run again"
    )


class IterationStore:
    """The folder of one self-play iteration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = ShardStore(folder / "rollouts")
        self.reference_parts = ReferenceParts(folder / "reference")

    @property
    def manifest_path(self) -> Path:
        """What made the iteration."""
        return self.folder / "manifest.json"

    @property
    def difficulty_path(self) -> Path:
        """The difficulties after the probe, one row a prompt."""
        return self.folder / "difficulty.parquet"

    @property
    def pairs_path(self) -> Path:
        """The pairs, in pair order."""
        return self.folder / "pairs.parquet"

    @property
    def diagnostics_path(self) -> Path:
        """What the iteration did to the policy, in numbers."""
        return self.folder / "diagnostics.json"

    def read_diagnostics(self) -> dict[str, float]:
        """Return them by metric name; none where they are missing or damaged."""
        try:
            return {
                name: float(value)
                for name, value in read_checksummed(self.diagnostics_path.read_bytes()).items()
            }
        except (OSError, ValueError, TypeError):
            return {}

    @property
    def complete(self) -> bool:
        """Whether the iteration's data is final."""
        manifest = self.read_manifest()
        return manifest is not None and bool(manifest["complete"])

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write what made the iteration."""
        write_atomically(self.manifest_path, with_checksum(manifest))

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or ``None`` before the iteration began."""
        path = self.manifest_path
        if not path.exists():
            return None
        try:
            found = read_checksummed(path.read_bytes())
        except ValueError as error:
            raise _damaged(path, error) from error
        wrong = next(_wrong_types(found), None)
        if wrong is not None:
            raise _damaged(path, f"{wrong!r} is {found[wrong]!r}")
        return _Manifest(found, path)

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
                f"{self.shards.folder} was deleted to save space, but this run resumes from there: continue from the "
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
        write_table(self.difficulty_path, pa.table(columns, DIFFICULTY_SCHEMA))

    def read_difficulty(self) -> tuple[StatisticsTable, set[str]]:
        """Return the table and the ids of the selected prompts."""
        table = read_table(self.difficulty_path, DIFFICULTY_SCHEMA)
        prompt_ids = table["prompt_id"].to_pylist()
        columns = {
            name: torch.tensor(table[name].to_numpy(), dtype=torch.float64) for name in DIFFICULTY_COLUMNS
        }
        selected = {key for key, keep in zip(prompt_ids, table["selected"].to_pylist(), strict=True) if keep}
        return StatisticsTable(tuple(prompt_ids), columns), selected

    def known(self, prompt_ids: tuple[str, ...]) -> StatisticsTable:
        """Return the difficulties of some prompts, and whether they were ``selected`` (1 or 0); NaN where not known."""
        table, selected = self.read_difficulty()
        column = torch.tensor([prompt_id in selected for prompt_id in table.prompt_ids], dtype=torch.float64)
        return StatisticsTable(table.prompt_ids, {**table.columns, "selected": column}).aligned(prompt_ids)

    def write_pairs(self, pairs: PairTable) -> None:
        """Write the iteration's pairs, in pair order."""
        write_table(self.pairs_path, pairs.table)

    def read_pairs(self) -> PairTable:
        """Return the iteration's pairs, in pair order."""
        return PairTable(read_table(self.pairs_path, PAIR_SCHEMA, added=ADDED_COLUMNS, optional=TOKEN_LOGPS))
