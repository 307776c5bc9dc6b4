"""Notices where training makes chosen responses less likely too."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.training.batching import PairBatch

SIDES = ("chosen", "rejected")


class DisplacementWarning(SelfPlayCallback):
    """Says so when an iteration's last step finds both responses less likely than under the reference.

    Likelihood displacement: the loss rewards the margin alone, so that both may fall (arXiv 2410.08847).
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch | None,
        batch_idx: int,
    ) -> None:
        """Look at the step's mean log-ratios."""
        if batch is None or not batch.slot.ends_iteration:
            return
        found = [trainer.callback_metrics.get(f"train/logratios/{side}") for side in SIDES]
        ratios = [float(value) for value in found if value is not None]
        if len(ratios) == len(SIDES) and max(ratios) < 0:
            rank_zero_info(
                f"By the iteration's last step chosen responses lost {-ratios[0]:.2f} nat and rejected ones "
                f"{-ratios[1]:.2f}: both became less likely. A larger beta or a smaller learning rate holds them."
            )
