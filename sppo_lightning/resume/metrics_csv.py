"""A logger that keeps every metric in one CSV file, across resumes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import UserError


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row a call, a column for each metric ever logged.

    A resumed run logs again what came after its checkpoint, which remembers how many rows there were: with
    :meth:`resume_after` the others give way, so that the file has neither gaps nor repeats.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._planned = 0  # rows that stay once something is logged
        self._rows: int | None = None  # in the file; None: nothing has been logged yet

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Always empty: there is one file a run."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        if self._rows is None:
            self._rows = self._cut(self._planned)
        row = {"step": str(step or 0), **{name: repr(float(value)) for name, value in metrics.items()}}
        fresh = [name for name in row if name not in self._columns]
        linked = self.path.is_symlink()  # gives way to a file, so that its target stays as it is
        if fresh or linked or not self.path.exists():
            rows = [*self._read(self._rows), row]
            self._columns += sorted(fresh)
            write_atomically(self.path, self._text(rows, header=True))
        else:
            with self.path.open("ab") as file:
                file.write(self._text([row], header=False))
        self._rows += 1

    @rank_zero_only
    def resume_after(self, rows: int) -> None:
        """Have the first ``rows`` rows of an interrupted run stay, and the others give way to the first new one."""
        self._planned = rows

    def _cut(self, rows: int) -> int:
        """Keep the first rows of the file, and return how many there are; those that it has lost are missed."""
        kept = self._read(rows)
        if len(kept) < rows:
            rank_zero_warn(f"{self.path} has only {len(kept)} of the {rows} rows that the checkpoint counts.")
        used = {"step"}.union(*kept)
        before, self._columns = self._columns, [name for name in self._columns if name in used] or ["step"]
        if self.path.exists() and (self._columns != before or len(self._read()) != len(kept)):
            write_atomically(self.path, self._text(kept, header=True))
        return len(kept)

    def rows_on_disk(self) -> int:
        """Return how many rows there are, once all of them would outlive a loss of power."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self._planned if self._rows is None else self._rows

    def _read(self, limit: int | None = None) -> list[dict[str, str]]:
        """Return the file's first rows, and take up its columns."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            try:
                reader = csv.DictReader(file, strict=True)
                rows = [{k: v for k, v in row.items() if v} for row in islice(reader, limit)]
                self._columns = list(reader.fieldnames or [])
                wrong = next((number for number, row in enumerate(rows, 2) if None in row), None)
            except (UnicodeDecodeError, csv.Error) as error:
                raise self._damaged(str(error)) from error
        if wrong is not None:
            raise self._damaged(f"row {wrong} has more cells than the header")
        return rows

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self.path} is damaged ({why}): restore it from a copy, or rename it to begin a new one"
        )

    def _text(self, rows: list[dict[str, str]], *, header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
