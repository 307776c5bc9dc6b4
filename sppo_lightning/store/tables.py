"""Parquet tables with checksums, read and written whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sppo_lightning.system.durable import disk_error, replacing
from sppo_lightning.types import UserError, first_line

ROWS_IN_WRITING = 1024  # of a table, held a second time, encoded


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table, replacing the one that is there in one step."""
    with replacing(path) as file:
        pq.write_table(
            table, file, compression="zstd", write_page_checksum=True, row_group_size=ROWS_IN_WRITING
        )


def read_table(
    path: Path,
    schema: pa.Schema,
    *,
    added: Mapping[str, float | None] = MappingProxyType({}),
    optional: Sequence[pa.Field] = (),
) -> pa.Table:
    """Return the columns of ``schema``, and those of ``optional`` that are there.

    Args:
        path: of the file.
        schema: names and types of its columns.
        added: columns that older files lack, all of them together, and what stands for each; ``None``: null.

    Raises:
        UserError: if the file is damaged.
        OSError: if the disk does not let it be read, which says nothing about the file.
    """
    try:
        there = set(pq.read_schema(path).names) if added or optional else set()
        lacking = added if added and there.isdisjoint(added) else {}
        schema = pa.schema([*schema, *(field for field in optional if field.name in there)])
        table = pq.read_table(
            path,
            columns=[name for name in schema.names if name not in lacking],
            partitioning=None,
            page_checksum_verification=True,
            pre_buffer=False,  # it would keep the file in memory in addition to the table
        )
        for name, value in lacking.items():
            table = table.append_column(name, pa.repeat(value, table.num_rows))
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        if disk_error(error, path) is not None:
            raise
        what = "gone" if isinstance(error, FileNotFoundError) else f"damaged ({first_line(error)})"
        raise UserError(
            f"{path} is {what}: restore it from a copy, or give the same command again, which "
            "quarantines it and makes it anew if its iteration has not been trained on"
        ) from error


def check_token_ids(path: Path, table: pa.Table, columns: Sequence[str], *, embedding_rows: int) -> None:
    """Refuse a table with token ids that the policy has no embeddings for: any model would break down on them.

    Args:
        path: of the table's file.
        table: as it was read.
        columns: lists of token ids.
        embedding_rows: of the policy.

    Raises:
        UserError: naming the file.
    """
    for name in columns:
        span = pc.min_max(pc.list_flatten(table[name])).as_py()
        found = [token for token in (span["min"], span["max"]) if token is not None]
        wrong = [token for token in found if not 0 <= token < embedding_rows]
        if wrong:
            raise UserError(
                f"{path} holds the token id {wrong[0]}, but the policy has ids from 0 to {embedding_rows - 1} only: "
                "restore it from a copy, or start anew in another trainer.default_root_dir"
            )


def row_count(path: Path) -> int:
    """Return the rows of a table; 0 if it cannot be read."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return 0  # damaged: as good as gone
