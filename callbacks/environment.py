"""Writes what a run runs on next to its data."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.environment import add_start, describe_environment
from sppo_lightning.training.hardware import is_dev_run


class EnvironmentFile(pl.Callback):
    """Adds versions and device of each start of ``fit`` to ``environment.json``, for the report."""

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, unless nothing is to be kept."""
        if is_dev_run(trainer):
            return
        start = describe_environment(
            trainer.strategy.root_device, processes=trainer.world_size, step=trainer.global_step
        )
        add_start(RunFolder(Path(trainer.default_root_dir)).environment, start)
