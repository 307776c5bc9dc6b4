"""What held-out evaluation logs, as torchmetrics."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric


def mean_with_error(values: Tensor) -> Tensor:
    """Return ``[3]``: mean, standard error and count of the finite ``values``.

    The standard error is the sample standard deviation over the root of the count; NaN below two values.
    """
    values = values[values.isfinite()].to(torch.float32 if values.device.type == "mps" else torch.float64)
    count = torch.tensor(float(len(values)), dtype=values.dtype, device=values.device)
    error = values.std() / count.sqrt() if len(values) > 1 else count.new_tensor(float("nan"))
    return torch.stack([values.mean(), error, count])


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


class EvaluationBatch(NamedTuple):
    """Measurements of held-out answers, one value an answer."""

    reward: Tensor  # [P] float32, NaN where scoring failed
    win: Tensor  # [P] float32, 1 above the initial policy's reward, 0.5 equal, 0 below; NaN without one
    length: Tensor  # [P] float32, tokens
    failed: Tensor  # [P] float32, 1 where the reward is non-finite


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
