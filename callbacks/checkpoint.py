"""Keeps the checkpoint that a run resumes from."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.resume.checkpoints import DurableCheckpointIO, sharded_path, switch_to_sharded
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.store.pruning import prune
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.training.hardware import is_dev_run

KEY = "sppo_lightning.RunCheckpoint"


class RunCheckpoint(SelfPlayCallback, Checkpoint):
    """Writes ``checkpoints/last.ckpt`` every few minutes, after an iteration's last step, and at its end.

    Only between two optimizer steps, so that no gradients are lost. In addition to Lightning's own state it holds
    how many pairs of the iteration are consumed, how many rows ``metrics.csv`` has, and the states of the random
    generators, of the first process, for users' classes that draw from them. A signal that asks the run to stop is
    deferred during a step, and raised once the step is in a checkpoint.

    Args:
        every_n_minutes: between two checkpoints while an iteration trains.
    """

    def __init__(self, every_n_minutes: float = 10.0) -> None:
        if not every_n_minutes > 0:
            raise ValueError(f"RunCheckpoint.every_n_minutes={every_n_minutes} must be greater than 0")
        self.every_n_minutes = every_n_minutes
        self._saved_at = 0.0  # seconds, of the monotonic clock
        self._saved_step = 0  # optimizer steps in the last checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written so that they outlive a loss of power, unless another writer was asked for."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count minutes and steps."""
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defer signals from here on."""
        self_play_data(trainer).stop.defer()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Between two optimizer steps, save if it is time to, or if the run has to stop."""
        if batch.slot.first_in_step:
            due = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
            self._save_or_stop(trainer, due)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what an iteration has trained before it is evaluated."""
        if trainer.state.fn == "fit" and self_play_data(trainer).iteration_is_trained:
            self._save_or_stop(trainer, True)
            self_play_data(trainer).stop.stop_deferring()

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Save what the iteration ends with; where another one comes, signals wait for its first step."""
        data.stop.defer()
        self._saved_step = -1  # what is known at its end is new, even where no step is
        self._save_or_stop(trainer, True)
        self._prune(trainer, iteration + 1)
        data.stop.stop_deferring()

    def _save_or_stop(self, trainer: pl.Trainer, due: bool) -> None:
        """Save if that is due here or a stop is asked for anywhere, then stop where it is: one decision for all."""
        stop = self_play_data(trainer).stop
        decide = trainer.strategy.reduce_boolean_decision
        if not decide(due or stop.received, all=False):
            return
        asked = decide(stop.received, all=False)
        if trainer.global_step != self._saved_step and not is_dev_run(trainer):
            self._save(trainer)
        if asked:
            stop.raise_pending()

    def _save(self, trainer: pl.Trainer) -> None:
        last = RunFolder(Path(trainer.default_root_dir)).last_checkpoint
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            # by one process: another may see an older link, and take the good one for what a kill has left
            own = str(sharded_path(last, trainer.global_step)) if trainer.is_global_zero else ""
            shards = Path(trainer.strategy.broadcast(own))
            trainer.save_checkpoint(shards, weights_only=False)
            if trainer.is_global_zero:
                switch_to_sharded(last, shards)
            trainer.strategy.barrier("last.ckpt switched")
        else:
            trainer.save_checkpoint(last, weights_only=False)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _prune(self, trainer: pl.Trainer, finished: int) -> None:
        datamodule = self_play_data(trainer)
        if datamodule.keep_iterations is not None and trainer.is_global_zero and not is_dev_run(trainer):
            prune(datamodule.folder, finished, datamodule.keep_iterations)

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add how far ``metrics.csv`` goes, and the random generators."""
        rows = [logger.rows_on_disk() for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        checkpoint[KEY] = {"rows": rows[0] if rows else 0, "random": _random_state()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what :meth:`on_save_checkpoint` added, and let ``metrics.csv`` continue where the checkpoint was."""
        if trainer.state.fn != "fit" or KEY not in checkpoint:  # saved by a run without this callback
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.resume_after(checkpoint[KEY]["rows"])
        if trainer.is_global_zero:
            _restore_random_state(checkpoint[KEY]["random"])
        # of a run that was killed after its last checkpoint
        self._prune(trainer, checkpoint[type(self_play_data(trainer)).__qualname__]["finished"])


def _random_state() -> dict[str, Any]:
    """Return the states of the random generators, as containers and tensors that load with ``weights_only``."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
