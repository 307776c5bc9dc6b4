"""torchmetrics for held-out evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
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
