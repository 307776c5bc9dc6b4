"""What training and held-out evaluation log, as torchmetrics."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torchmetrics import SumMetric

from sppo_lightning.losses import PairLogps, PreferenceTerms

STEP_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
)


class StepMetrics(nn.Module):
    """Means over the pairs of one optimizer step, on all ranks; nothing is synchronised until :meth:`result`."""

    def __init__(self) -> None:
        super().__init__()
        # the check for NaN would wait for the device at every update; a NaN that is logged says more
        self.sums = nn.ModuleDict(
            {name: SumMetric(nan_strategy="disable") for name in (*STEP_METRICS, "pairs")}
        )

    def update(
        self, policy: PairLogps, reference: PairLogps, terms: PreferenceTerms, weights: Tensor
    ) -> None:
        """Add a micro-batch; ``[B]`` each, ``weights`` 0 for fillers."""
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
        }
        for name, value in values.items():
            cast(SumMetric, self.sums[name]).update((value.detach() * weights).sum())
        cast(SumMetric, self.sums["pairs"]).update(weights.sum())

    def result(self) -> dict[str, Tensor]:
        """Return the step's means under ``train/`` and start over."""
        sums = {name: cast(SumMetric, metric).compute() for name, metric in self.sums.items()}
        for metric in self.sums.values():
            cast(SumMetric, metric).reset()
        return {f"train/{name}": sums[name] / sums["pairs"] for name in STEP_METRICS}
