"""What the loop reads off a Lightning Trainer: its processes, and how far ``fit`` has come."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar, cast

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


class FitPosition(NamedTuple):
    """Where ``fit`` stands between its epochs."""

    epoch: int  # the Trainer's current epoch
    trained: int  # epochs whose batches are all done
    inside: bool  # whether an epoch has begun and its batches are not all done

    @property
    def epoch_is_over(self) -> bool:
        """Whether the current epoch's batches are done: at its end, and when Lightning resumes from there."""
        return self.trained > self.epoch


def fit_position(trainer: pl.Trainer) -> FitPosition:
    """Return where ``fit`` stands.

    ``current_epoch`` alone does not say: after a resume at an epoch's end it still names the finished one.
    """
    progress = cast(Any, trainer.fit_loop.epoch_progress.current)
    return FitPosition(
        epoch=trainer.current_epoch,
        trained=int(progress.processed),
        inside=bool(progress.started > progress.processed),
    )


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Whether ``fast_dev_run`` is on, so that nothing is to be kept."""
    return bool(cast(Any, trainer).fast_dev_run)
