"""``metrics.csv`` while it grows: rows that are new, read once."""

from __future__ import annotations

import csv
from pathlib import Path


class MetricsTail:
    """Follows a run's metrics.

    Args:
        path: of the file, there or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._file: int | None = None  # its number on the disk: with a new column it is written anew
        self._header = b""  # numbers of files are used again
        self._read = 0  # bytes

    def update(self) -> bool:
        """Read what is new, and return whether anything is."""
        try:
            state = self.path.stat()
            if (state.st_ino, state.st_size) == (self._file, self._read):
                return False
            with self.path.open("rb") as file:
                header = file.readline()
                if state.st_ino != self._file or header != self._header or state.st_size < self._read:
                    self.rows, self._read = [], len(header)
                    self._file, self._header = state.st_ino, header
                file.seek(self._read)
                new = file.read()
        except OSError:
            return False
        whole = new[: new.rfind(b"\n") + 1]  # a line may still be under way
        self._read += len(whole)
        columns = _cells(self._header.decode(errors="replace"))
        lines = whole.decode(errors="replace").split("\n")[:-1]
        self.rows += [_numbers(columns, _cells(line)) for line in lines]
        return bool(whole)

    def column(self, name: str) -> list[float]:
        """Return the values of a metric, in the order in which they were logged."""
        return [row[name] for row in self.rows if name in row]


def _cells(line: str) -> list[str]:
    """Return the cells of a line; none of one that is damaged."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _numbers(columns: list[str], cells: list[str]) -> dict[str, float]:
    values = {name: _number(cell) for name, cell in zip(columns, cells, strict=False) if cell}
    return {name: value for name, value in values.items() if value is not None}


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # of a damaged line
        return None
