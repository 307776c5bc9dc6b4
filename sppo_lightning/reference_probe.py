"""Does a frozen reference stay where it is when the adapter beside it moves? Tried before training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sppo_lightning.live_policy import LivePolicy
from sppo_lightning.lora import replaced_weights

STEP = 0.02  # standard deviation of the noise that moves an adapter: of the size of its weights


def check_reference_is_frozen(policy: LivePolicy, logps: Callable[[nn.Module], Tensor]) -> None:
    """Move the adapter for a moment: the initial policy's log-probs must stay, and the policy's own must move.

    Args:
        policy: with an adapter.
        logps: reads a few log-probs of a model, of any shape.

    Raises:
        RuntimeError: if the reference follows the adapter, or if the adapter changes nothing.
    """
    with policy.initial() as initial:
        before = logps(initial)
    with replaced_weights(policy.model, _moved(policy.model)):
        own = logps(policy.model)
        with policy.initial() as initial:
            after = logps(initial)
    if not torch.equal(before, after):
        raise RuntimeError(
            f"the reference's log-probs moved by up to {(after - before).abs().max():.2g} nat when the adapter did: it "
            "is not frozen"
        )
    if torch.equal(own, after):
        raise RuntimeError("the policy's log-probs stayed when its adapter moved: the adapter is not in use")


def _moved(model: nn.Module) -> dict[str, Tensor]:
    """Return other weights for all that is trained."""
    generator = torch.Generator().manual_seed(0)
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {
        name: parameter.detach().cpu() + STEP * torch.randn(parameter.shape, generator=generator)
        for name, parameter in trained
    }
