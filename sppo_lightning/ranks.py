"""The Trainer's processes, as the loop sees them."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist

from sppo_lightning.types import Ranks

T = TypeVar("T")


class TrainerRanks(Ranks):
    """Ranks of a Lightning Trainer."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.rank = trainer.global_rank
        self.world_size = trainer.world_size

    def barrier(self, name: str) -> None:
        """Return once every rank has called it."""
        self._trainer.strategy.barrier(name)

    def gather(self, values: list[Any]) -> list[list[Any]]:
        """Return every rank's values, in rank order, on every rank."""
        if self.world_size == 1:
            return [values]
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, values)
        return gathered

    def same(self, value: T) -> T:
        """Return rank zero's value on every rank."""
        return self._trainer.strategy.broadcast(value)
