"""What a training step logs, as one torchmetric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from sppo_lightning.losses import PairLogps, PreferenceLoss, PreferenceTerms

STEP_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
)
LOG_RATIOS = ("logratios/chosen", "logratios/rejected", "logratios/chosen_fell")


class StepMetrics(Metric):
    """Means over the pairs of one optimizer step, on all ranks: one state, so that ranks meet in one collective.

    Args:
        loss: without a reference there are no log-ratios; its parts are logged too.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        self.names = (*STEP_METRICS, *(LOG_RATIOS if loss.needs_reference else ()), *loss.parts)
        taken = [part for part in loss.parts if self.names.count(part) > 1 or part == "lr"]
        if taken:
            raise ValueError(
                f"model.loss {type(loss).__name__}: its part {taken[0]!r} would be logged as train/{taken[0]}, where "
                "something else is logged: give it another name"
            )
        self.add_state(
            "sums", torch.zeros(len(self.names) + 1), dist_reduce_fx="sum"
        )  # the last one counts pairs

    def update(
        self, policy: PairLogps, reference: PairLogps, terms: PreferenceTerms, weights: Tensor
    ) -> None:
        """Add a micro-batch; ``[B]`` each, ``weights`` 0 for padding pairs."""
        margin = terms.chosen_reward - terms.rejected_reward
        values = {
            "loss": terms.loss,
            "rewards/chosen": terms.chosen_reward,
            "rewards/rejected": terms.rejected_reward,
            "rewards/margin": margin,
            "rewards/accuracy": (margin > 0).to(margin.dtype),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "logratios/chosen": policy.chosen - reference.chosen,
            "logratios/rejected": policy.rejected - reference.rejected,
            "logratios/chosen_fell": (policy.chosen < reference.chosen).to(margin.dtype),
            **terms.parts,
        }
        rows = [(values[name].detach() * weights).sum() for name in self.names]
        self.sums = self.sums + torch.stack([*rows, weights.sum()]).to(self.sums.dtype)

    def compute(self) -> dict[str, Tensor]:
        """Return the step's means under ``train/``."""
        means = self.sums[:-1] / self.sums[-1]
        return {f"train/{name}": mean for name, mean in zip(self.names, means, strict=True)}

    def result(self) -> dict[str, Tensor]:
        """Return :meth:`compute` and start over."""
        found: dict[str, Tensor] = self.compute()
        self.reset()
        return found
