"""What the self-play loop asks of the module that trains, and of callbacks that follow it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch

from sppo_lightning.losses import PreferenceLoss
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.policy.trained import TrainedPolicy
from sppo_lightning.training.optimizers import OptimizerFactory, reset_state
from sppo_lightning.training.reference import FrozenReference
from sppo_lightning.types import PhaseProgress


class SelfPlayModule(pl.LightningModule, ABC):
    """A LightningModule that trains a policy on the loop's micro-batches, :class:`~.batching.PairBatch`.

    Attributes:
        policy_spec: which model; no weights.
        loss: says what has to be computed for it.
        reference: reads the pairs before the first step.
        pair_forward: how log-probs are computed.
        optimizer_factory: makes the optimizer; ``None``: the default.
        carry_optimizer: whether its state is kept while the next iteration samples.
        learning_rate_factor: scales the rate from here on; a callback may lower it.
    """

    policy_spec: PolicySpec
    loss: PreferenceLoss
    reference: FrozenReference
    pair_forward: PairForward
    optimizer_factory: OptimizerFactory | None
    carry_optimizer: bool
    learning_rate_factor: float = 1.0

    @property
    @abstractmethod
    def trained_policy(self) -> TrainedPolicy:
        """The policy, once it is loaded."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the Trainer's matrix products."""

    def reset_optimizers(self) -> None:
        """Clear what the optimizers know: the weights are no longer those that it is about."""
        for optimizer in self.trainer.optimizers:
            reset_state(optimizer)

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if Trainer and settings do not fit; no weights are loaded."""

    @abstractmethod
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


@runtime_checkable
class IterationObserver(Protocol):
    """Whoever wants to know that an iteration starts, among the Trainer's callbacks."""

    def on_iteration_start(self, trainer: pl.Trainer, data: Any, iteration: int, /) -> Any:
        """Called before an iteration samples anything, on every process."""


@runtime_checkable
class SamplingObserver(Protocol):
    """Whoever wants to follow the sampling of a batch, among the Trainer's callbacks."""

    def on_sampling_progress(self, trainer: pl.Trainer, progress: PhaseProgress, /) -> Any:
        """Called several times a second while a batch of responses is sampled, on every process that samples."""
