"""The command ``estimate``: how much device memory each phase of a run needs, before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.memory.advice import verdict
from sppo_lightning.memory.estimate import GIB, Estimator, available_bytes
from sppo_lightning.module import PreferenceModule
from sppo_lightning.preflight import workload_of
from sppo_lightning.training.batching import accumulation_steps
from sppo_lightning.training.hardware import (
    check_precision,
    check_spread_sizes,
    compute_dtype,
    strategy_refusal,
)
from sppo_lightning.types import UserError


class Hardware(NamedTuple):
    """What a run is planned for, which may be more than this machine has."""

    device: torch.device
    processes: int
    spread: bool = False  # whether the policy's weights are spread over the processes
    float16: bool = (
        False  # whether products are in float16, for which a Trainer of this machine may take bfloat16
    )


def planned_hardware(
    accelerator: object,
    devices: int | str | Sequence[int],
    nodes: int,
    strategy: object,
    precision: object = None,
) -> Hardware:
    """Return what a Trainer's settings ask for.

    Args:
        accelerator: as the Trainer takes it; so the others.
        devices: ``auto``: those of this machine.
        nodes: machines.
        strategy: as the Trainer takes it.
        precision: as the Trainer takes it.

    Raises:
        UserError: if ``fit`` would refuse the strategy.
    """
    has_cuda = torch.cuda.is_available()
    on_cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and has_cuda)
    here = torch.cuda.device_count() if on_cuda and has_cuda else 1
    if isinstance(devices, str):
        listed = [part for part in devices.split(",") if part]
        count = int(devices) if devices.lstrip("-").isdigit() else here if devices == "auto" else len(listed)
    else:
        count = devices if isinstance(devices, int) else len(devices)
    processes = nodes * (here if count == -1 else count)
    spread = _spreads(strategy, processes)
    float16 = on_cuda and precision in (16, "16", "16-mixed")
    return Hardware(torch.device("cuda" if on_cuda else "cpu"), processes, spread, float16)


def _spreads(strategy: Any, processes: int) -> bool:
    """Whether a strategy, as the Trainer takes it, spreads weights over processes; refuse what ``fit`` refuses."""
    name = (
        strategy
        if isinstance(strategy, str)
        else str(getattr(strategy, "class_path", type(strategy).__name__))
    )
    name = name.rpartition(".")[2]
    if name == "ModelParallelStrategy":
        given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
        sizes = (given.get("data_parallel_size", "auto"), given.get("tensor_parallel_size", "auto"))
        check_spread_sizes(*sizes, processes=processes)
        return True
    if name not in ("auto", "SingleDeviceStrategy", "DDPStrategy") and not name.startswith("ddp"):
        raise UserError(strategy_refusal(name, processes))
    return False


def check_plannable(accelerator: object) -> None:
    """Refuse to estimate for a device whose memory this project does not know.

    Args:
        accelerator: as the Trainer takes it.

    Raises:
        UserError: naming those that it knows.
    """
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(
            f"trainer.accelerator={accelerator}: only the memory of CPUs and CUDA GPUs can be estimated: give "
            "--trainer.accelerator gpu to see what the run would take of a CUDA GPU"
        )


class SelfPlayTrainer(pl.Trainer):
    """A Trainer with one more command."""

    def estimate(
        self,
        model: PreferenceModule,
        datamodule: SelfPlayDataModule,
        hardware: Hardware,
        memory: float | None = None,
    ) -> None:
        """Say how much device memory each phase of a run needs, and which settings make it fit; nothing is loaded.

        Args:
            model: the policy's settings.
            datamodule: the loop's settings; prompts are taken to be as long as ``data.max_prompt_tokens`` lets them.
            hardware: that the run is planned for.
            memory: of each device, GiB; default: what is free on this machine's.

        Raises:
            UserError: if the run does not fit, or ``fit`` would refuse its settings.
        """
        device = hardware.device
        if memory is not None and not memory > 0:
            raise UserError(f"--memory {memory:g}: give the GiB of one device, e.g. --memory 24")
        check_precision(self)
        if memory is None and device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "this machine has no GPU to compare with: say how much memory the run's has, e.g. --memory 24"
            )
        dtype = torch.float16 if hardware.float16 else compute_dtype(self)
        rules = datamodule.rules
        accumulation_steps(
            pairs_per_step=rules.pairs_per_step, batch_size=rules.batch_size, world_size=hardware.processes
        )
        model.policy_spec.check(compute_dtype=dtype, device=device)
        workload = workload_of(
            model,
            rules,
            datamodule.generator,
            datamodule.reward,
            compute_dtype=dtype,
            clips=bool(self.gradient_clip_val),
            longest_prompt=datamodule.prompt_sets.max_tokens,
            longest_trained_prompt=datamodule.prompt_sets.max_tokens,
            device=device,
            processes=hardware.processes,
            spread=hardware.spread,
        )
        estimator = Estimator(available_bytes(device) if memory is None else int(memory * GIB))
        found = estimator.estimate(workload)
        print(found.table(), flush=True)
        objection = verdict(estimator, workload, found)
        if objection is not None:
            raise UserError(objection)
