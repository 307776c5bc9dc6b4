"""The frozen reference of an iteration, and whether it is what it has to be.

Frozen while the policy moves, and the policy itself at an iteration's start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from sppo_lightning.losses import PairLogps
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.parity import probe_pairs
from sppo_lightning.policy.agreement import compare_stored_sums
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.loading import without_dropout
from sppo_lightning.policy.lora import replaced_weights
from sppo_lightning.policy.sharding import local, shard_like
from sppo_lightning.policy.snapshot import PolicySnapshot
from sppo_lightning.policy.trained import TrainedPolicy
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.training.hardware import compute_dtype

ROUNDING = 0.01  # of what an adapter's move changes
STEP = 0.02  # standard deviation of the noise that moves an adapter: of the size of its weights


class FrozenReference:
    """Reads an iteration's pairs with the frozen reference, by the forward of training.

    Args:
        policy: returns the one that is trained, which knows the one that the run started from.
        forward: that of training.
        kind: ``previous_iteration``: the policy before the iteration's first step; ``initial``: the policy that the
            run started from.
        trainer: returns the Trainer whose precision passes take.
    """

    def __init__(
        self,
        policy: Callable[[], TrainedPolicy],
        forward: PairForward,
        *,
        kind: Literal["previous_iteration", "initial"],
        trainer: Callable[[], pl.Trainer],
    ) -> None:
        self.kind = kind
        self._policy = policy
        self._forward = forward
        self._trainer = trainer
        self._held: PolicySnapshot | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all iterations have the same reference."""
        return self.kind == "initial"

    @property
    def forward_is_collective(self) -> bool:
        """Whether all processes have to read equally many batches, since each of them holds a part of the weights."""
        return self._policy().is_sharded

    def fingerprint(self) -> str:
        """Return a digest of the reference that is held."""
        assert self._held is not None, "held() comes first"
        return self._held.fingerprint()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the reference in memory while the context lasts."""
        policy = self._policy()
        with policy.initial() if self.is_fixed else nullcontext(policy.current()) as self._held:
            try:
                with without_dropout(self._held.model):
                    yield
            finally:
                self._held = None

    def logps_by_token(self, batch: PairBatch) -> PairLogps:
        """Return the log-probs of a batch's response tokens, ``[B, T]`` each, float64, nats, on the CPU."""
        assert self._held is not None, "held() comes first"
        return self._read(self._held.model, batch)

    def policy_logps_by_token(self, batch: PairBatch) -> PairLogps:
        """Return the same of the policy as it is now."""
        model = self._policy().model
        with without_dropout(model):
            return self._read(model, batch)

    def _read(self, model: nn.Module, batch: PairBatch) -> PairLogps:
        rows = move_data_to_device(batch.rows, next(model.parameters()).device)
        with torch.no_grad(), self._trainer().precision_plugin.forward_context():
            logps = self._forward.logps_by_token(model, rows)
        return PairLogps(logps.chosen.cpu(), logps.rejected.cpu())

    def check_is_frozen(self, layout: PairLayout) -> None:
        """Raise if the initial policy follows the adapter; see :func:`check_reference_is_frozen`.

        Args:
            layout: of micro-batches.
        """
        vocabulary = unwrapped(self._policy().model).config.get_text_config().vocab_size
        rows = move_data_to_device(
            layout.rows(*probe_pairs(vocabulary)), next(self._policy().model.parameters()).device
        )

        def logps(model: nn.Module) -> Tensor:
            with torch.no_grad(), self._trainer().precision_plugin.forward_context(), without_dropout(model):
                return torch.cat(self._forward.logps(model, rows))

        check_reference_is_frozen(self._policy(), logps)

    def check_start(self, policy: nn.Module, batch: PairBatch, *, iteration_is_first: bool) -> None:
        """Raise if the policy's log-probs differ from the reference's although the two are the same.

        Args:
            policy: before the iteration's first step is taken.
            batch: with the reference's log-probs.
            iteration_is_first: whether this is the run's first iteration.
        """
        if self.is_fixed and not iteration_is_first:
            return
        with torch.no_grad(), without_dropout(policy):
            logps = self._forward.logps(policy, batch.rows)
        check_same_logps(
            logps, batch.reference, tokens=batch.rows.targets.numel(), dtype=compute_dtype(self._trainer())
        )


def check_reference_is_frozen(policy: TrainedPolicy, logps: Callable[[nn.Module], Tensor]) -> None:
    """Move the adapter for a moment: the initial policy's log-probs must stay, and the policy's own must move.

    Args:
        policy: with an adapter.
        logps: reads a few log-probs of a model, of any shape.

    Raises:
        RuntimeError: if the reference follows the adapter, or if the adapter changes nothing.
    """
    with policy.initial() as initial:
        before = logps(initial.model)
    with replaced_weights(policy.model, _moved(policy.model)):
        own = logps(policy.model)
        with policy.initial() as initial:
            after = logps(initial.model)
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
            + shard_like(STEP * torch.randn(parameter.shape, generator=generator), parameter).to(
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
