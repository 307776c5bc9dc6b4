"""Progress of a reference pass on disk: log-probs of some pairs a file, until the iteration's pairs are written."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sppo_lightning.store.pairs import PairTable
from sppo_lightning.system.durable import replacing

SIDES = ("chosen", "rejected")
TOKENS = ("chosen_tokens", "rejected_tokens")
FEWEST, MOST = 32, 2048  # pairs of a part: what several processes can share; what is little to lose at a kill


def cut_into_parts(order: Sequence[int]) -> list[list[int]]:
    """Return rows in parts, about as many as each of them has rows, whatever the number of processes."""
    size = min(max(2 * math.isqrt(len(order)), FEWEST), MOST)
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def digest(pairs: PairTable, rows: Sequence[int], fingerprint: str) -> str:
    """Return what tells whether stored log-probs are those of these tokens under this reference.

    Args:
        pairs: an iteration's.
        rows: of them.
        fingerprint: of the reference.
    """
    found = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for row in rows:
        pair = pairs[row]
        tokens = (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        found.update(repr((row, tokens)).encode())
    return found.hexdigest()


TokenLogps = tuple[list[list[float]], list[list[float]]]
"""Log-probs of the tokens of chosen and rejected responses, one list a pair, nats."""


class StoredPart(NamedTuple):
    """What a file holds."""

    logps: Tensor  # [2, rows] float64, nats, chosen first
    tokens: TokenLogps | None  # where they were asked for
    provenance: str  # digest of its pairs


class ReferenceParts:
    """The folder of an iteration's parts.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def read(self, number: int) -> StoredPart | None:
        """Return a part; ``None`` if it is not there or damaged: it can be computed again."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        except (pa.ArrowException, OSError):
            return None
        provenance = (table.schema.metadata or {}).get(b"digest", b"").decode()
        logps = torch.stack([torch.tensor(table[side].to_numpy()) for side in SIDES])
        if not set(TOKENS) <= set(table.column_names):
            return StoredPart(logps, None, provenance)
        chosen, rejected = (table[side].to_pylist() for side in TOKENS)
        return StoredPart(logps, (chosen, rejected), provenance)

    def write(self, number: int, logps: Tensor, tokens: TokenLogps | None, provenance: str) -> None:
        """Write a part.

        Args:
            number: of the part.
            logps: ``[2, rows]`` float64 in nats, chosen first.
            tokens: the log-probs of their tokens, where a loss reads them.
            provenance: the digest of its pairs.
        """
        columns: dict[str, Any] = dict(zip(SIDES, (side.numpy() for side in logps), strict=True))
        columns |= {} if tokens is None else dict(zip(TOKENS, tokens, strict=True))
        table = pa.table(columns).replace_schema_metadata({"digest": provenance})
        with replacing(self._path(number)) as file:
            pq.write_table(table, file, write_page_checksum=True)

    def remove(self) -> None:
        """Remove the folder, once the pairs hold what it held."""
        shutil.rmtree(self.folder, ignore_errors=True)
