"""torchmetrics for held-out evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanWithError(Metric):
    """Mean and its standard error over all updates, on all ranks; non-finite values are left out.

    ``compute`` returns ``[3]``: mean, standard error (sample standard deviation over the root of the count;
    NaN below two values), count.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        flat = values.detach().flatten()
        self.values.append(flat[flat.isfinite()])

    def compute(self) -> Tensor:
        """Return mean, standard error, count."""
        values = torch.cat(self.values) if isinstance(self.values, list) else self.values
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
        count = torch.tensor(float(len(values)), dtype=values.dtype, device=values.device)
        error = values.std() / count.sqrt() if len(values) > 1 else count.new_tensor(float("nan"))
        return torch.stack([values.mean(), error, count])
