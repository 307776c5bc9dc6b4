"""Tables and histograms for each logger that can show them; any other one gets metrics only.

Cells come from prompts and models: they are given as text, never as HTML, and as :func:`for_terminal` leaves them,
without marks that reorder or hide text and without half surrogate pairs, which no tracker can encode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from sppo_lightning.loggers.trackio import TrackioLogger
from sppo_lightning.text import for_markdown, for_terminal

Rows = Sequence[Sequence[str | float]]

BINS = 64
"""Of a histogram, where the tracker does not choose them."""


class LoggerMedia(Protocol):
    """What a logger shows beyond metrics."""

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Log a table.

        Args:
            name: the same for all steps.
            columns: their headings, all different.
            rows: a cell for each column.
            step: optimizer steps of the run so far, as for metrics.
        """

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Log the distribution of some numbers.

        Args:
            name: the same for all steps.
            values: ``[n]``, at least one, all finite.
            step: optimizer steps of the run so far, as for metrics.
        """


@singledispatch
def media_of(logger: Logger) -> LoggerMedia | None:
    """Return how a logger is given tables and histograms; ``None``: it takes metrics only."""
    return None


@media_of.register
def _(logger: TensorBoardLogger) -> LoggerMedia:
    return TensorBoardMedia(logger)


@media_of.register
def _(logger: WandbLogger) -> LoggerMedia:
    return WandbMedia(logger)


@media_of.register
def _(logger: MLFlowLogger) -> LoggerMedia:
    return MLFlowMedia(logger)


@media_of.register
def _(logger: TrackioLogger) -> LoggerMedia:
    return TrackioMedia(logger)


@dataclass(frozen=True)
class TensorBoardMedia:
    """A table is a text, in Markdown."""

    logger: TensorBoardLogger

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """See :class:`LoggerMedia`."""
        self.logger.experiment.add_text(name, markdown_table(columns, rows), step)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See :class:`LoggerMedia`."""
        self.logger.experiment.add_histogram(name, values, step)


@dataclass(frozen=True)
class WandbMedia:
    """A table and a histogram are a step's values, as metrics are."""

    logger: WandbLogger

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """See :class:`LoggerMedia`."""
        self.logger.log_table(name, columns=list(columns), data=_plain(rows), step=step)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See :class:`LoggerMedia`."""
        import wandb

        found: dict[str, Any] = {name: wandb.Histogram(np_histogram=np.histogram(values, BINS))}
        self.logger.log_metrics(found, step)


@dataclass(frozen=True)
class MLFlowMedia:
    """A table is a JSON file of the run's artifacts, one a step; MLflow has no histograms, so that they are tables."""

    logger: MLFlowLogger

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """See :class:`LoggerMedia`; a step that has its table keeps it, since MLflow would append to it."""
        client, run_id = self.logger.experiment, self.logger.run_id
        place = f"{name}/{step:08d}.json"
        if place not in {item.path for item in client.list_artifacts(run_id, name)}:
            cells = zip(*_plain(rows), strict=True) if rows else ([] for _ in columns)
            table = {column: list(values) for column, values in zip(columns, cells, strict=True)}
            client.log_table(run_id, table, place)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See :class:`LoggerMedia`."""
        counts, edges = np.histogram(values, BINS)
        rows = list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
        self.log_table(f"histograms/{name}", ("from", "to", "count"), rows, step)


@dataclass(frozen=True)
class TrackioMedia:
    """A table and a histogram are a step's values, as metrics are."""

    logger: TrackioLogger

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """See :class:`LoggerMedia`."""
        import trackio

        self.logger.log_metrics({name: trackio.Table(columns=list(columns), data=_plain(rows))}, step)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See :class:`LoggerMedia`."""
        import trackio

        found = {name: trackio.Histogram(np_histogram=np.histogram(values, BINS))}
        self.logger.log_metrics(found, step)


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """Return a table in Markdown, numbers with three decimals, texts as they are written."""
    head, *lines = (
        f"| {' | '.join(line)} |" for line in (columns, *(map(_markdown_cell, row) for row in rows))
    )
    return "\n".join([head, "|" + "---|" * len(columns), *lines]) + "\n"


def _markdown_cell(cell: str | float) -> str:
    return for_markdown(cell) if isinstance(cell, str) else f"{cell:.3f}"


def _plain(rows: Rows) -> list[list[str | float]]:
    return [[for_terminal(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
