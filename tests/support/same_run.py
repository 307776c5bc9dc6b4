"""Are two run folders the same, bit by bit, times and memory aside?"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

OWN = ("metrics.csv", "checkpoints/last.ckpt")
"""Files that are compared by what they say."""
TIMED = ("report.html", "environment.json")
"""Files that say when and how long: both have them or none."""
LOCK = ".lock"  # names the process that holds it, and stays


def rows(run: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Return what the Parquet files of a run hold that match ``pattern``, of which there must be some."""
    found = sorted(run.glob(pattern))
    assert found
    return {str(path.relative_to(run)): pq.read_table(path, partitioning=None).to_pylist() for path in found}


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two run folders: names of files, of weights and of states, rows of metrics.

    All files count, with all their bytes, but those that say times. Of the checkpoint, what Lightning counts for
    itself (micro-batches, calls of hooks) is left out: the data module counts for it.
    """
    files = [
        {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
        for root in (one, other)
    ]
    found = [f"only one has {name}" for name in sorted(files[0] ^ files[1])]
    both = sorted(files[0] & files[1])
    found += [
        name
        for name in both
        if name not in OWN + TIMED and (one / name).read_bytes() != (other / name).read_bytes()
    ]
    if "metrics.csv" in both:
        found += _rows_that_differ(metric_rows(one), metric_rows(other))
    if "checkpoints/last.ckpt" in both:
        states = [torch.load(root / "checkpoints/last.ckpt", weights_only=True) for root in (one, other)]
        for state in states:
            del state["loops"]
        found += [f"checkpoint: {name}" for name in _states_that_differ(*states)]
    return found


def leftovers(root: Path) -> list[str]:
    """Return the hidden files and folders of a run folder: beside its lock, a finished run has none."""
    return sorted({str(path.relative_to(root)) for path in root.rglob(".*")} - {LOCK})


def metric_rows(root: Path) -> list[dict[str, str]]:
    """Return the rows of ``metrics.csv``, less times and memory."""
    with (root / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
            for row in csv.DictReader(file)
        ]


def _rows_that_differ(one: list[dict[str, str]], other: list[dict[str, str]]) -> Iterator[str]:
    if len(one) != len(other):
        yield f"metrics.csv has {len(one)} and {len(other)} rows"
    elif one and list(one[0]) != list(other[0]):
        yield "metrics.csv has other columns"
    for number, (row, again) in enumerate(zip(one, other, strict=False)):
        for name in row:
            if row[name] != again.get(name):
                yield f"metrics.csv row {number}, {name}: {row[name]} and {again.get(name)}"


def _states_that_differ(one: Any, other: Any, name: str = "") -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield name
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _states_that_differ(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for number, (item, again) in enumerate(zip(one, other, strict=True)):
            yield from _states_that_differ(item, again, f"{name}/{number}")
    elif type(one) is not type(other) or one != other:
        yield name
