"""A logger that keeps every metric in one CSV file, across resumes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.durable import write_atomically


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row a call, a column for each metric ever logged.

    A resumed run logs its steps again from the checkpoint on: rows of later steps, and rows of the same step
    with the same metrics, give way to the new ones, so that the file has neither gaps nor repeats.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = ["step"]
        self._earlier: list[dict[str, str]] = []  # rows of the interrupted run that may give way
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._earlier = [{k: v for k, v in row.items() if v} for row in reader]
                self._columns = list(reader.fieldnames or self._columns)

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
        row = {"step": str(step or 0), **{name: repr(float(value)) for name, value in metrics.items()}}
        earlier = len(self._earlier)
        rewrite = self._give_way(int(row["step"]), set(row))
        fresh = [name for name in row if name not in self._columns]
        if fresh or rewrite or not self.path.exists():
            self._columns += sorted(fresh)
            rows = [*self._earlier, *self._rows()[earlier:], row]
            write_atomically(self.path, self._text(rows, header=True))
        else:
            with self.path.open("ab") as file:
                file.write(self._text([row], header=False))

    def _give_way(self, step: int, columns: set[str]) -> bool:
        """Drop rows of the interrupted run that this row replaces; say whether any was dropped."""
        kept = [
            row
            for row in self._earlier
            if int(row["step"]) < step or (int(row["step"]) == step and set(row) != columns)
        ]
        dropped = len(kept) < len(self._earlier)
        self._earlier = kept
        return dropped

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    def _text(self, rows: list[dict[str, str]], *, header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
