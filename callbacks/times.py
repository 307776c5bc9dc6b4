"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl

from sppo_lightning.batching import PairBatch
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.types import PhaseProgress


class PhaseTimes(pl.Callback):
    """Logs the seconds of each phase when an iteration ends.

    ``time/probing``, ``time/generating``, ``time/evaluating`` (held-out answers), ``time/scoring``,
    ``time/reference``, ``time/training``, and ``time/other``: what is left of the time since the iteration before
    ended (since the start, for the first), such as loading, fingerprints, the last checkpoint and export. Wall time,
    of the first process.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._begun = self._phase_begun = self._training_begun = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start to follow the data module's phases."""
        if stage == "fit" and trainer.is_global_zero:
            datamodule = self_play_data(trainer)
            datamodule.observers = [*datamodule.observers, self]
            self._begun = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Follow no longer."""
        if stage == "fit":
            datamodule = self_play_data(trainer)
            datamodule.observers = [other for other in datamodule.observers if other is not self]

    def on_phase_progress(self, progress: PhaseProgress) -> None:
        """Take the time of a phase of the data module."""
        if progress.done == 0:
            self._phase_begun = time.perf_counter()
        if progress.done == progress.total:
            self._seconds[progress.phase] += time.perf_counter() - self._phase_begun

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to train."""
        self._training_begun = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        """Take the time of a micro-batch and of the wait for it."""
        now = time.perf_counter()
        self._seconds["training"] += now - self._training_begun
        self._training_begun = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the times once the iteration is over."""
        if not trainer.is_global_zero or not self_play_data(trainer).iteration_ends:
            return
        now = time.perf_counter()
        other = now - self._begun - sum(self._seconds.values())
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"time/{name}": seconds for name, seconds in {**self._seconds, "other": other}.items()},
                step=trainer.global_step,
            )
        self._seconds.clear()
        self._begun = now
