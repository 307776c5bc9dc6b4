"""Writes next to a run's data what the same command resumes it by."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.loggers.runs import record_runs
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.training.hardware import is_dev_run


class RunConfigFile(pl.Callback):
    """Writes ``config.yaml`` and ``loggers.json`` once all that can be checked has been, before the first sample.

    Args:
        content: the resolved config, YAML.
    """

    def __init__(self, content: str) -> None:
        self.content = content

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files, unless nothing is to be kept."""
        if not is_dev_run(trainer):
            folder = RunFolder(Path(trainer.default_root_dir))
            write_atomically(folder.config, self.content.encode())
            record_runs(folder, trainer.loggers)
