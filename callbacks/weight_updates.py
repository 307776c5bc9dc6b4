"""Looks whether the first optimizer step moves the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.policy.sharding import local
from sppo_lightning.training.batching import PairBatch

FIRST_FACTORS = ("lora_A.default.weight", "lora_embedding_B.default")
SAMPLE = 1 << 20  # weights that are compared


class WeightUpdateCheck(SelfPlayCallback):
    """Logs ``train/weights_moved``, the share of some weights that the run's first optimizer step changed.

    Warns where it is 0: updates that round to nothing, or a loss that does not reach the trained weights.
    """

    def __init__(self) -> None:
        self._before: tuple[nn.Parameter, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy some of the largest trained matrix, of a run that begins."""
        if trainer.global_step == 0:
            trained = {name: item for name, item in pl_module.named_parameters() if item.requires_grad}
            # one factor of a fresh adapter has no gradient at first, since the other one is 0
            moving = {
                name: item for name, item in trained.items() if not name.endswith(FIRST_FACTORS)
            } or trained
            largest = max(moving.values(), key=lambda parameter: local(parameter.detach()).numel())
            self._before = (largest, _sample(largest))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch | None,
        batch_idx: int,
    ) -> None:
        """Compare, after the first optimizer step that was taken."""
        if self._before is None or batch is None or not batch.slot.last_in_step:
            return
        parameter, before = self._before
        moved = float((_sample(parameter) != before).float().mean())
        if moved == 0 and str(trainer.precision) == "16-mixed":
            return  # a gradient scaler skips steps until its scale fits
        self._before = None
        for logger in trainer.loggers:
            logger.log_metrics({"train/weights_moved": moved}, step=trainer.global_step)
        if moved == 0:
            rank_zero_warn(
                "The first optimizer step moved no weight: raise model.learning_rate, or find out why the loss "
                "does not reach the trained weights."
            )


def _sample(parameter: nn.Parameter) -> Tensor:
    """Return a copy of some of the weights that this process holds."""
    return local(parameter.detach()).flatten()[:SAMPLE].clone()
