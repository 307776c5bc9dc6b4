"""The norm of a step's gradients, through a real Trainer."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from sppo_lightning.callbacks import GradientNorm


class Plane(pl.LightningModule):
    """A loss whose gradients are 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (3 * self.first + 4 * self.second).sum()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_of_the_step_and_before_clipping(tmp_path: Path, micro_batches: int) -> None:
    module = Plane()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        gradient_clip_val=1.0,
        accumulate_grad_batches=micro_batches,
        callbacks=[GradientNorm()],
        default_root_dir=tmp_path,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False),
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.zeros(micro_batches), num_workers=0))
    assert float(trainer.callback_metrics["train/grad_norm"]) == pytest.approx(5.0)
    assert [float(item.detach()) for item in module.parameters()] == pytest.approx(
        [-0.6, -0.8]
    )  # clipped to 1
