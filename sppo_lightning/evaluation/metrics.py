"""What held-out evaluation logs, as torchmetrics."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from sppo_lightning.evaluation.measures import EvaluationBatch, mean_with_error


class MeanWithError(Metric):
    """:func:`mean_with_error` over all updates, on all ranks."""

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.values.append(values.detach().flatten())

    def compute(self) -> Tensor:
        """Return mean, standard error, count."""
        return mean_with_error(torch.cat(self.values) if isinstance(self.values, list) else self.values)


class EvaluationMetrics(nn.Module):
    """Means over held-out answers, on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.ModuleDict({name: MeanWithError() for name in EvaluationBatch._fields})

    def update(self, batch: EvaluationBatch) -> None:
        """Add answers."""
        for name, values in batch._asdict().items():
            cast(MeanWithError, self.means[name]).update(values)

    def result(self, prefix: str) -> dict[str, float]:
        """Return the means under ``prefix``, the win rate where there is a baseline, and start over.

        Answers whose reward is not finite are warned about.
        """
        found: dict[str, list[float]] = {}
        for name, mean in self.means.items():
            found[name] = cast(MeanWithError, mean).compute().tolist()
            cast(MeanWithError, mean).reset()
        result = {
            f"{prefix}/reward/mean": found["reward"][0],
            f"{prefix}/reward/stderr": found["reward"][1],
            f"{prefix}/response_length/mean": found["length"][0],
            f"{prefix}/failed/share": found["failed"][0],
        }
        if found["win"][2]:
            result[f"{prefix}/win_rate"] = found["win"][0]
        if found["failed"][0] > 0:
            rank_zero_warn(f"{found['failed'][0]:.1%} of the {prefix} answers have a non-finite reward.")
        return result
