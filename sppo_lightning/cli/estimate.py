"""The command ``estimate``: how much device memory each phase of a run needs, before anything loads."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace

from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.memory.advice import diagnosis
from sppo_lightning.memory.estimate import GIB, Estimator, available_bytes
from sppo_lightning.memory.workload import PromptLengths
from sppo_lightning.module import PreferenceModule
from sppo_lightning.preflight import workload_of
from sppo_lightning.training.batching import accumulation_steps
from sppo_lightning.training.hardware import (
    Hardware,
    check_precision,
    check_shard_sizes,
    compute_dtype,
    strategy_refusal,
)
from sppo_lightning.types import UserError


def planned_hardware(settings: Namespace, compute_dtype: torch.dtype) -> Hardware:
    """Return what a run is planned for, which may be more than this machine has.

    Args:
        settings: of the Trainer, as the config has them.
        compute_dtype: of a Trainer of this machine's CPU, which takes another precision for float16.

    Raises:
        UserError: if ``fit`` would refuse the strategy.
    """
    return Hardware(
        torch.device("cuda" if _on_cuda(settings) else "cpu"),
        _planned_processes(settings),
        planned_sharding(settings),
        torch.float16 if _in_float16(settings) else compute_dtype,
    )


def _on_cuda(settings: Namespace) -> bool:
    given = settings.accelerator
    return given in ("gpu", "cuda") or (given == "auto" and torch.cuda.is_available())


def _in_float16(settings: Namespace) -> bool:
    return _on_cuda(settings) and settings.precision in (16, "16", "16-mixed")


def _planned_processes(settings: Namespace) -> int:
    devices: int | str | Sequence[int] = settings.devices
    here = torch.cuda.device_count() if _on_cuda(settings) and torch.cuda.is_available() else 1
    if isinstance(devices, str):
        listed = [part for part in devices.split(",") if part]
        count = int(devices) if devices.lstrip("-").isdigit() else here if devices == "auto" else len(listed)
    else:
        count = devices if isinstance(devices, int) else len(devices)
    return int(settings.num_nodes * (here if count == -1 else count))


def planned_sharding(settings: Namespace) -> bool:
    """Whether a run's weights will be sharded over its processes.

    Args:
        settings: of the Trainer, as the config has them.

    Raises:
        UserError: if ``fit`` would refuse the strategy.
    """
    strategy, processes = settings.strategy, _planned_processes(settings)
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    name = name.rpartition(".")[2]
    if name == "ModelParallelStrategy":
        given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
        sizes = (given.get("data_parallel_size", "auto"), given.get("tensor_parallel_size", "auto"))
        check_shard_sizes(*sizes, processes=processes)
        return True
    if name not in ("auto", "SingleDeviceStrategy", "DDPStrategy") and not name.startswith("ddp"):
        raise UserError(strategy_refusal(name, processes))
    return False


def plan_on_cpu(settings: Namespace) -> None:
    """Change a Trainer's settings so that it can be made on this machine, whatever the run is planned for.

    Args:
        settings: of the Trainer, as the config has them.

    Raises:
        UserError: if they ask for a device whose memory this project does not know.
    """
    if settings.accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(
            f"trainer.accelerator={settings.accelerator}: only the memory of CPUs and CUDA GPUs can be estimated: give "
            "--trainer.accelerator gpu to see what the run would take of a CUDA GPU"
        )
    if _in_float16(settings):
        settings.precision = "32-true"
    settings.accelerator, settings.devices, settings.num_nodes, settings.strategy = "cpu", 1, 1, "auto"


class SelfPlayTrainer(pl.Trainer):
    """A Trainer with one more command."""

    def estimate(
        self,
        model: PreferenceModule,
        datamodule: SelfPlayDataModule,
        planned: Namespace,
        memory: float | None = None,
    ) -> None:
        """Say how much device memory each phase of a run needs, and which settings make it fit; nothing is loaded.

        Args:
            model: the policy's settings.
            datamodule: the loop's settings; prompts are taken to be as long as ``data.max_prompt_tokens`` lets them.
            planned: the Trainer's settings as the config has them; this Trainer's are those of a CPU.
            memory: of each device, GiB; default: what is free on this machine's.

        Raises:
            UserError: if the run does not fit, or ``fit`` would refuse its settings.
        """
        check_precision(self)
        hardware = planned_hardware(planned, compute_dtype(self))
        device, rules = hardware.device, datamodule.rules
        if memory is not None and not memory > 0:
            raise UserError(f"--memory {memory:g}: give the GiB of one device, e.g. --memory 24")
        if memory is None and device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "this machine has no GPU to compare with: say how much memory the run's has, e.g. --memory 24"
            )
        accumulation_steps(
            pairs_per_step=rules.pairs_per_step, batch_size=rules.batch_size, world_size=hardware.processes
        )
        model.policy_spec.check(compute_dtype=hardware.compute_dtype, device=device)
        longest = datamodule.prompt_sets.max_tokens
        workload = workload_of(
            self, model, datamodule, hardware=hardware, prompts=PromptLengths(longest, longest)
        )
        estimator = Estimator(available_bytes(device) if memory is None else int(memory * GIB))
        found = estimator.estimate(workload)
        print(found.table(), flush=True)
        problem = diagnosis(estimator, workload, found)
        if problem is not None:
            raise UserError(problem)
