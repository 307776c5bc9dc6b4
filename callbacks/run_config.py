"""Writes the resolved config next to a run's data."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.training.hardware import is_dev_run


class RunConfigFile(pl.Callback):
    """Writes ``config.yaml`` once everything that can be checked has been, before the first sample.

    Args:
        content: the resolved config, YAML.
    """

    def __init__(self, content: str) -> None:
        self.content = content

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, unless nothing is to be kept."""
        if not is_dev_run(trainer):
            write_atomically(RunFolder(Path(trainer.default_root_dir)).config, self.content.encode())
