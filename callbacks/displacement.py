"""Notices where training makes chosen responses less likely too."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.training.batching import PairBatch

SIDES = ("chosen", "rejected")
HOLDS = "A larger beta, a smaller learning rate, or the term ChosenNLL added to the loss holds them."


class DisplacementWarning(SelfPlayCallback):
    """Warns where chosen responses become much less likely than under the reference, while there is time to stop.

    Likelihood displacement: the loss rewards the margin alone, so that both responses may fall (arXiv 2410.08847). Once
    an iteration, at the first step at which the mean chosen log-ratio of the last ``steps`` steps is below
    ``-max_drop``; and a line at the iteration's last step if both responses are less likely then.

    Args:
        max_drop: nat that chosen responses may lose on average; greater than 0.
        steps: optimizer steps that are averaged.
    """

    def __init__(self, max_drop: float = 5.0, steps: int = 3) -> None:
        if not max_drop > 0:
            raise ValueError(f"DisplacementWarning.max_drop={max_drop} must be greater than 0")
        if steps < 1:
            raise ValueError(f"DisplacementWarning.steps={steps} must be at least 1")
        self.max_drop = max_drop
        self.steps = steps
        self._last: deque[float] = deque(maxlen=steps)
        self._warned = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch | None,
        batch_idx: int,
    ) -> None:
        """Look at the step's mean log-ratios."""
        if batch is None or not batch.slot.last_in_step:
            return
        if batch.slot.step == 0:
            self._last.clear()
            self._warned = False
        found = [trainer.callback_metrics.get(f"train/logratios/{side}") for side in SIDES]
        ratios = [float(value) for value in found if value is not None]
        if len(ratios) < len(SIDES):
            return
        self._last.append(ratios[0])
        drop = -sum(self._last) / len(self._last)
        if len(self._last) == min(self.steps, batch.slot.steps) and drop > self.max_drop and not self._warned:
            self._warned = True
            rank_zero_info(
                f"Step {batch.slot.step + 1} of {batch.slot.steps} of this iteration: chosen responses have lost "
                f"{drop:.1f} nat on average over the last {len(self._last)} step(s), and the policy may forget how to "
                f"answer. {HOLDS}"
            )
        elif batch.slot.ends_iteration and max(ratios) < 0:
            rank_zero_info(
                f"By the iteration's last step chosen responses lost {-ratios[0]:.2f} nat and rejected ones "
                f"{-ratios[1]:.2f}: both became less likely. {HOLDS}"
            )
