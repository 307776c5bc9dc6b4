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

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.rendezvous import FileRanks, open_session
from sppo_lightning.training.precision import COMPUTE_DTYPES
from sppo_lightning.types import UserError

SHARD_SIZES = (
    "strategy: {{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: "
    "{{data_parallel_size: {processes}, tensor_parallel_size: 1}}}}"
)


class Hardware(NamedTuple):
    """What a run computes on, and in which dtype."""

    device: torch.device  # of the first process
    processes: int  # that share the run, a device each
    sharded: bool  # whether the policy's weights are sharded over them (FSDP2), instead of full on each
    compute_dtype: torch.dtype  # of matrix products

    @property
    def shards(self) -> int:
        """Parts that the weights lie in."""
        return self.processes if self.sharded else 1


def hardware_of(trainer: pl.Trainer) -> Hardware:
    """Return what a Trainer computes on."""
    return Hardware(
        trainer.strategy.root_device,
        trainer.world_size,
        isinstance(trainer.strategy, ModelParallelStrategy),
        compute_dtype(trainer),
    )


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
        check_shard_sizes(
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
        f"{SHARD_SIZES.format(processes=processes)}"
    )


def check_shard_sizes(data: int | str, tensor: int | str, *, processes: int) -> None:
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
            f"{processes} processes: weights are sharded over all of them and no product is split, but auto, the "
            f"default, splits products inside each machine; say both sizes: {SHARD_SIZES.format(processes=processes)}"
        )


def disable_slurm_requeue(trainer: pl.Trainer) -> None:
    """Have Lightning neither save nor requeue by itself on a signal of SLURM's: it would do so inside a step.

    Args:
        trainer: before it runs.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def open_ranks(trainer: pl.Trainer, root: Path) -> FileRanks:
    """Let a Trainer's processes meet in the run's folder; a process that another one started ends with it.

    Args:
        trainer: its processes are there.
        root: the run's folder.
    """
    return open_session(
        RunFolder(root).rendezvous,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        broadcast=trainer.strategy.broadcast,
        parent=os.getppid() if trainer.local_rank > 0 else None,  # a node's first one may run under nohup
    )


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Whether ``fast_dev_run`` is on, so that nothing is to be kept."""
    return bool(cast(Any, trainer).fast_dev_run)
