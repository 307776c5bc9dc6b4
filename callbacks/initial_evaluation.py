"""Logs the held-out evaluation of the initial policy."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import move_data_to_device

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.evaluation.metrics import EvaluationMetrics


class InitialEvaluation(SelfPlayCallback):
    """Logs ``val/…`` of the policy that the run starts from, before the first optimizer step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the stored answers; all processes take part."""
        if trainer.global_step > 0:
            return
        metrics = EvaluationMetrics().to(pl_module.device)
        batches = list(self_play_data(trainer).val_dataloader())
        for batch in batches:
            metrics.update(move_data_to_device(batch, pl_module.device))
        if batches:
            result = metrics.result("val")
            for logger in trainer.loggers:
                logger.log_metrics(result, step=trainer.global_step)
