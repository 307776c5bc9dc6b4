"""The spans that an iteration falls into, and how long they take."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.types import PhaseProgress


class PhaseMeter(SelfPlayCallback, ABC):
    """Cuts the run into spans, has each of them measured, and logs an iteration's when it ends.

    A span belongs to a phase of the data module, to ``training`` (a micro-batch and the wait for it), or to
    ``other``: all that lies between, such as loading, fingerprints, the last checkpoint and export. Followed on the
    first process alone.
    """

    @abstractmethod
    def start(self, trainer: pl.Trainer) -> None:
        """Begin the first span."""

    @abstractmethod
    def end_span(self, name: str) -> None:
        """Take what a span needed, and begin the next.

        Args:
            name: of the phase that the span belongs to, or ``other``.
        """

    @abstractmethod
    def end_iteration(self) -> dict[str, float]:
        """Return the metrics of the spans since the iteration before ended, if there are any, and forget them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the first span of ``fit``."""
        if stage == "fit" and trainer.is_global_zero:
            self.start(trainer)

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Note where a phase of ``fit`` begins and ends."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if progress.done == 0:
            self.end_span("other")
        if progress.done == progress.total:
            self.end_span(progress.phase)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where training begins."""
        if trainer.is_global_zero:
            self.end_span("other")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        """Note where a micro-batch ends."""
        if trainer.is_global_zero:
            self.end_span("training")

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Log the iteration's spans."""
        if trainer.is_global_zero:
            self.end_span("other")
            if metrics := self.end_iteration():
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.global_step)


class PhaseTimes(PhaseMeter):
    """Logs the seconds of each phase when an iteration ends.

    ``time/probing``, ``time/generating``, ``time/evaluating`` (held-out answers), ``time/scoring``,
    ``time/reference``, ``time/training``, and ``time/other``: what is left of the time since the iteration before
    ended (since the start, for the first), such as loading, fingerprints, the last checkpoint and export. Wall time,
    of the first process.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._begun = 0.0

    def start(self, trainer: pl.Trainer) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def end_span(self, name: str) -> None:
        """Add a span's time to that of its phase."""
        now = time.perf_counter()
        self._seconds[name] += now - self._begun
        self._begun = now

    def end_iteration(self) -> dict[str, float]:
        """Return the seconds of each phase, and forget them."""
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds
