"""Gives loggers the distributions of difficulty and reward."""

from __future__ import annotations

from itertools import chain

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.loggers.media import media_of
from sppo_lightning.resume.metrics_csv import MetricsCSV

LARGEST = 1e150  # of what is drawn: squares, which TensorBoard sums, stay finite


class IterationHistograms(SelfPlayCallback):
    """Logs histograms of an iteration's data before its first optimizer step, to the loggers that show histograms.

    ``iteration/difficulty``: of all prompts with a known difficulty; ``iteration/reward``: of all usable responses.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say once which loggers get metrics only."""
        if stage != "fit":
            return
        for logger in trainer.loggers:
            if media_of(logger) is None and not isinstance(logger, MetricsCSV):
                rank_zero_info(
                    f"{type(logger).__name__} gets metrics only: tables of answers and histograms go to TensorBoard, "
                    "W&B, MLflow and Trackio."
                )

    @rank_zero_only
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log, where the epoch is an iteration's first."""
        data = self_play_data(trainer)
        receivers = [media for media in map(media_of, trainer.loggers) if media is not None]
        if data.steps_taken > 0 or not receivers:
            return
        store = data.folder.iteration(data.current_iteration)
        difficulty, _ = store.read_difficulty()
        rewards = np.fromiter(chain.from_iterable(store.kept_shards().rewards().values()), dtype=np.float64)
        for name, values in {"difficulty": difficulty["difficulty"].numpy(), "reward": rewards}.items():
            drawn = values[np.abs(values) < LARGEST]
            for media in receivers if len(drawn) else ():
                media.log_histogram(f"iteration/{name}", drawn, trainer.global_step)
