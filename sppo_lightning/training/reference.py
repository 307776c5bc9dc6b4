"""Is the reference what it has to be: frozen while the policy moves, and the policy itself at an iteration's start?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sppo_lightning.losses import PairLogps
from sppo_lightning.policy.agreement import compare_stored_sums
from sppo_lightning.policy.live import LivePolicy
from sppo_lightning.policy.lora import replaced_weights
from sppo_lightning.policy.sharding import local, part_of

ROUNDING = 0.01  # of what an adapter's move changes
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
    moved, policy_moved = float((after - before).abs().max()), float((own - before).abs().max())
    # to the last bit on a CPU; a GPU does not promise to round two passes alike
    if not moved <= (0.0 if before.device.type == "cpu" else ROUNDING * policy_moved):
        raise RuntimeError(
            f"the reference's log-probs moved by up to {moved:.2g} nat when the adapter did: it is not frozen"
        )
    if torch.equal(own, after):
        raise RuntimeError("the policy's log-probs stayed when its adapter moved: the adapter is not in use")


def _moved(model: nn.Module) -> dict[str, Tensor]:
    """Return other weights for what this process holds of all that is trained."""
    generator = torch.Generator().manual_seed(0)
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {
        name: (
            local(parameter.detach())
            + part_of(STEP * torch.randn(parameter.shape, generator=generator), parameter).to(
                parameter.device
            )
        )
        for name, parameter in trained
    }


def check_same_logps(policy: PairLogps, reference: PairLogps, *, tokens: int, dtype: torch.dtype) -> None:
    """Compare the log-probs of the two where they are the same network: log-ratios have to be 0.

    Args:
        policy: ``[B]`` each, nats, by the policy before its first step.
        reference: ``[B]`` each, nats, as stored.
        tokens: of all responses.
        dtype: of the matrix products.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    agreement = compare_stored_sums(torch.cat(policy), torch.cat(reference), tokens=tokens, dtype=dtype)
    if not agreement.holds:
        raise RuntimeError(
            f"at the start of an iteration policy and reference are the same, but their log-probs differ by "
            f"{agreement}: the reference is not the policy's own"
        )
