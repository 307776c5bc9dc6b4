"""What the self-play loop asks of the module that trains, and of callbacks that follow it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch

from sppo_lightning.losses import PreferenceLoss
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.policy.live import LivePolicy
from sppo_lightning.training.optimizers import OptimizerFactory
from sppo_lightning.training.reference import FrozenReference
from sppo_lightning.types import PhaseProgress


@runtime_checkable
class SelfPlayModule(Protocol):
    """A LightningModule that trains a policy on the loop's micro-batches, :class:`~.batching.PairBatch`."""

    live: LivePolicy
    loss: PreferenceLoss
    reference: FrozenReference
    pair_forward: PairForward
    optimizer_factory: OptimizerFactory | None
    carry_optimizer: bool

    @property
    def device(self) -> torch.device:
        """Where the policy is."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the Trainer's matrix products."""

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if Trainer and settings do not fit; no weights are loaded."""

    def pair_layout(self, longest: int) -> PairLayout:
        """Return the layout that micro-batches must have.

        Args:
            longest: most tokens of prompt and response together that may come.
        """


@runtime_checkable
class PhaseObserver(Protocol):
    """Whoever wants to follow a run's phases, among the Trainer's callbacks."""

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress, /) -> Any:
        """Called when a phase starts (``done == 0``), advances and ends (``done == total``), on every process."""
