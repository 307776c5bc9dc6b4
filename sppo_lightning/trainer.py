"""What the loop reads off a Lightning Trainer: its processes, and how far ``fit`` has come."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from sppo_lightning.types import Ranks, UserError

T = TypeVar("T")
SPREAD = (
    "strategy: {{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: "
    "{{data_parallel_size: {processes}, tensor_parallel_size: 1}}}}"
)
COMPUTE_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def compute_dtype(trainer: pl.Trainer) -> torch.dtype:
    """Return the dtype of a Trainer's matrix products."""
    return COMPUTE_DTYPES[str(trainer.precision)]


def check_hardware(trainer: pl.Trainer) -> None:
    """Refuse a precision, strategy or mode in which the loop does not run.

    Raises:
        UserError: naming the setting to change.
    """
    precision = str(trainer.precision)
    if precision not in COMPUTE_DTYPES:
        raise UserError(
            f"trainer.precision={precision} holds the trained weights in 16 bits, where small updates round to "
            "nothing: use bf16-mixed (float32 weights, bfloat16 products) or 32-true"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        strategy = trainer.strategy
        check_spread_sizes(
            strategy._data_parallel_size, strategy._tensor_parallel_size, processes=trainer.world_size
        )
        if not strategy._save_distributed_checkpoint:
            raise UserError(
                "trainer.strategy=ModelParallelStrategy with save_distributed_checkpoint=false would gather the "
                "optimizer's state in the host memory of one process: leave it out; each process then saves its part"
            )
    elif not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(strategy_refusal(type(trainer.strategy).__name__, trainer.world_size))
    if torch.are_deterministic_algorithms_enabled() and isinstance(trainer.accelerator, CUDAAccelerator):
        raise UserError(
            "trainer.deterministic=true: sampling sums in a way that CUDA cannot do deterministically: use "
            "deterministic: warn"
        )


def strategy_refusal(given: str, processes: int) -> str:
    """Return why a strategy is refused, and what to write instead.

    Args:
        given: its name.
        processes: of the run.
    """
    return (
        f"trainer.strategy={given} is not supported: use one device or ddp; for a model larger than a device FSDP2: "
        f"{SPREAD.format(processes=processes)}"
    )


def check_spread_sizes(data: int | str, tensor: int | str, *, processes: int) -> None:
    """Refuse tensor parallelism, and sizes that are left to Lightning, which takes it inside a machine.

    Args:
        data: ``data_parallel_size`` of a ``ModelParallelStrategy``.
        tensor: its ``tensor_parallel_size``.
        processes: of the run.

    Raises:
        UserError: with the setting to use.
    """
    if (data, tensor) != (processes, 1):
        raise UserError(
            f"trainer.strategy=ModelParallelStrategy with data_parallel_size={data}, tensor_parallel_size={tensor} for "
            f"{processes} processes: weights are spread over all of them and no product is split, but auto, the "
            f"default, splits products inside each machine; say both sizes: {SPREAD.format(processes=processes)}"
        )


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
