"""What the loop reads off a Lightning Trainer: its processes, and how far ``fit`` has come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from sppo_lightning.system.rendezvous import FileRanks, open_session
from sppo_lightning.types import UserError

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


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse a precision whose updates vanish.

    Raises:
        UserError: naming those that serve.
    """
    precision = str(trainer.precision)
    if precision not in COMPUTE_DTYPES:
        raise UserError(
            f"trainer.precision={precision} holds the trained weights in 16 bits, where small updates round to "
            "nothing: use bf16-mixed (float32 weights, bfloat16 products) or 32-true"
        )


def check_hardware(trainer: pl.Trainer) -> None:
    """Refuse a precision, strategy or mode in which the loop does not run.

    Raises:
        UserError: naming the setting to change.
    """
    check_precision(trainer)
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


def keep_to_own_signals(trainer: pl.Trainer) -> None:
    """Have Lightning neither save nor requeue by itself on a signal of SLURM's: it would do so inside a step.

    Args:
        trainer: before it runs.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def meet(trainer: pl.Trainer, root: Path) -> FileRanks:
    """Let a Trainer's processes meet in the run's folder; a process that another one started ends with it.

    Args:
        trainer: its processes are there.
        root: the run's folder.
    """
    return open_session(
        root,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        broadcast=trainer.strategy.broadcast,
        parent=os.getppid() if trainer.local_rank > 0 else None,  # a node's first one may run under nohup
    )


class FitPosition(NamedTuple):
    """Where ``fit`` stands between its epochs."""

    epoch: int  # the Trainer's current epoch
    trained: int  # epochs whose batches are all done
    inside: bool  # whether an epoch has begun and its batches are not all done

    @property
    def epoch_is_over(self) -> bool:
        """Whether the current epoch's batches are done."""
        return self.trained > self.epoch


def fit_position(trainer: pl.Trainer) -> FitPosition:
    """Return where ``fit`` stands."""
    progress = cast(Any, trainer.fit_loop.epoch_progress.current)
    return FitPosition(
        epoch=trainer.current_epoch,
        trained=int(progress.processed),
        inside=bool(progress.started > progress.processed),
    )


def stand_before_epoch(trainer: pl.Trainer, epoch: int, *, only_its_end: bool) -> None:
    """Let a Trainer that has read a checkpoint go on as if it stood between two epochs, whatever it stood in.

    Lightning counts micro-batches, whose number changes with that of the processes, and passes over an evaluation that
    was under way. Here the data module knows how far the epoch has come, and hands out the rest of it as an epoch.

    Args:
        trainer: in ``fit``, its loops' state read.
        epoch: that comes next.
        only_its_end: all of its optimizer steps have been taken.
    """
    loop = trainer.fit_loop
    loop.restarting = False
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        vars(progress).update(ready=epoch, started=epoch, processed=epoch, completed=epoch)
    loop.epoch_loop.batch_progress.reset()
    # the number under which loggers get what comes next; Lightning adds an epoch's last step behind its evaluation
    loop.epoch_loop._batches_that_stepped = trainer.global_step - only_its_end


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Whether ``fast_dev_run`` is on, so that nothing is to be kept."""
    return bool(cast(Any, trainer).fast_dev_run)
