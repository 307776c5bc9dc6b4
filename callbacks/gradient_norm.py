"""Logs how large the gradients of a step are."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorm(pl.Callback):
    """Logs ``train/grad_norm``: the norm of all gradients of an optimizer step, before they are clipped.

    Not under ``16-mixed`` without clipping, where a fused optimizer takes its gradients scaled.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log it in addition to the step's other metrics."""
        if str(trainer.precision) == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
            return
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        norm = get_total_norm([item.grad for item in parameters if item.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        pl_module.log("train/grad_norm", whole.float(), batch_size=1)
