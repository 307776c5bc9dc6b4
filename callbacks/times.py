"""The stretches that an iteration falls into, and how long they take."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl

from sppo_lightning.datamodule import self_play_data
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.types import PhaseProgress


class PhaseMeter(pl.Callback, ABC):
    """Cuts the run into stretches, has each of them measured, and logs an iteration's when it ends.

    A stretch belongs to a phase of the data module, to ``training`` (a micro-batch and the wait for it), or to
    ``other``: all that lies between, such as loading, fingerprints, the last checkpoint and export. Followed on the
    first process alone.
    """

    @abstractmethod
    def start(self, trainer: pl.Trainer) -> None:
        """Begin the first stretch."""

    @abstractmethod
    def end_stretch(self, name: str) -> None:
        """Take what a stretch needed, and begin the next.

        Args:
            name: of the phase that the stretch belongs to, or ``other``.
        """

    @abstractmethod
    def end_iteration(self) -> dict[str, float]:
        """Return the metrics of the stretches since the iteration before ended, if there are any, and forget them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start to follow the data module's phases."""
        if stage == "fit" and trainer.is_global_zero:
            datamodule = self_play_data(trainer)
            datamodule.observers = [*datamodule.observers, self]
            self.start(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Follow no longer."""
        if stage == "fit":
            datamodule = self_play_data(trainer)
            datamodule.observers = [other for other in datamodule.observers if other is not self]

    def on_phase_progress(self, progress: PhaseProgress) -> None:
        """Note where a phase of the data module begins and ends."""
        if progress.done == 0:
            self.end_stretch("other")
        if progress.done == progress.total:
            self.end_stretch(progress.phase)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where training begins."""
        if trainer.is_global_zero:
            self.end_stretch("other")

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
            self.end_stretch("training")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log once the iteration is over."""
        if trainer.is_global_zero and self_play_data(trainer).iteration_ends:
            self.end_stretch("other")
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

    def end_stretch(self, name: str) -> None:
        """Add a stretch's time to that of its phase."""
        now = time.perf_counter()
        self._seconds[name] += now - self._begun
        self._begun = now

    def end_iteration(self) -> dict[str, float]:
        """Return the seconds of each phase, and forget them."""
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds
