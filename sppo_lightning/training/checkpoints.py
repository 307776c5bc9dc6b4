"""What a checkpoint holds of the training module: the weights that are trained, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from sppo_lightning.policy.sharding import load_rest
from sppo_lightning.training.optimizers import reset_state
from sppo_lightning.types import UserError


def trained_names(policy: nn.Module | None) -> set[str]:
    """Return the names that a policy's trained weights have in a checkpoint."""
    if policy is None:
        return set()
    return {f"policy.{name}" for name, p in policy.named_parameters() if p.requires_grad}


def keep_trained(state: dict[str, Any], policy: nn.Module | None, *, prefix: str) -> None:
    """Remove from a module's state all but the policy's trained weights.

    Args:
        state: by name, changed in place.
        policy: of the module.
        prefix: of all names in ``state``.
    """
    kept = {f"{prefix}{name}" for name in trained_names(policy)}
    for name in [name for name in state if name not in kept]:
        del state[name]


def leave_out_optimizer_state(checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Keep no optimizer state that has been reset.

    Args:
        checkpoint: that is being saved, changed in place.
        optimizers: of the weights.
    """
    for state in checkpoint.get("optimizer_states", ()):
        state["state"] = {}  # a paged optimizer's is emptied only
    for optimizer in optimizers:
        reset_state(optimizer)  # of sharded weights torch has just made one, to have something to save


class DeferredOptimizers:
    """Keeps the optimizers from Lightning while it loads sharded weights: it cannot do without a stored state."""

    def __init__(self) -> None:
        self._held: list[Optimizer] = []

    def take_from(self, trainer: pl.Trainer) -> None:
        """Take the optimizers from the Trainer."""
        self._held, trainer.strategy.optimizers = trainer.strategy.optimizers, []

    def give_back_to(self, trainer: pl.Trainer) -> None:
        """Let the Trainer have its optimizers again, if they were taken."""
        if self._held:
            trainer.strategy.optimizers, self._held = self._held, []


def check_trained_weights(
    checkpoint: dict[str, Any], module: pl.LightningModule, policy: nn.Module | None, *, sharded: bool
) -> None:
    """Refuse a checkpoint of another policy; load the optimizer's state where weights are sharded.

    Args:
        checkpoint: as loaded.
        module: that its weights went into.
        policy: of the module.
        sharded: whether its weights are.

    Raises:
        UserError: naming a weight that only one of the two has.
    """
    expected, found = trained_names(policy), set(checkpoint.get("state_dict", ()))
    if sharded:
        trainer = module.trainer
        assert trainer.ckpt_path is not None
        fitting = trainer.state.fn == "fit"
        found = load_rest(Path(trainer.ckpt_path), module, trainer.optimizers if fitting else [])
    if found != expected:
        some = sorted(expected ^ found)[0]
        raise UserError(
            f"the checkpoint does not fit model.policy ({len(expected ^ found)} weights differ, e.g. {some}): "
            "use the model.policy settings that it was trained with"
        )
