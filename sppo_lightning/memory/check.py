"""Does a run fit its devices: asked before any weights load, and answered alike for all processes."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.generation import Generator
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.memory.advice import verdict as objection
from sppo_lightning.memory.estimate import GIB, Estimator, available_bytes
from sppo_lightning.memory.workload import Workload
from sppo_lightning.module import PreferenceModule
from sppo_lightning.rewards import Reward
from sppo_lightning.training.optimizers import clips_unscaled
from sppo_lightning.types import Ranks, UserError, first_line


def workload_of(
    module: PreferenceModule,
    rules: IterationRules,
    generator: Generator,
    reward: Reward,
    *,
    compute_dtype: torch.dtype,
    clips: bool,
    longest_prompt: int,
    longest_trained_prompt: int,
    device: torch.device,
    processes: int,
    spread: bool,
) -> Workload:
    """Return what decides a run's memory; the module's settings have been checked.

    Args:
        module: the policy's settings and training's.
        rules: sizes of steps and micro-batches.
        generator: answers prompts.
        reward: scores answers.
        compute_dtype: dtype of the matrix products.
        clips: whether gradients are clipped.
        longest_prompt: tokens of the longest prompt that may come.
        longest_trained_prompt: of those that may be trained on.
        device: of the first process.
        processes: that share the run, a device each.
        spread: whether the policy's weights are spread over them.
    """
    return Workload(
        policy=module.live.config,
        model_config=module.live.model_config,
        compute_dtype=compute_dtype,
        reference=module.reference,
        optimizer=module.optimizer_factory,
        clips_unscaled=clips_unscaled(compute_dtype, clips=clips),
        carry_optimizer=module.carry_optimizer,
        pair_forward=module.pair_forward,
        generator=generator,
        reward=reward,
        batch_size=rules.batch_size,
        pairs_per_step=rules.pairs_per_step,
        longest_prompt=longest_prompt,
        longest_trained_prompt=longest_trained_prompt,
        device=device,
        processes=processes,
        spread=spread,
    )


def check_memory(workload: Workload, ranks: Ranks, *, otherwise: Literal["refuse", "warn"]) -> None:
    """Compare what a run will need with what its devices have: one answer for all processes.

    Args:
        workload: the run.
        ranks: the processes.
        otherwise: what to do with a run that does not fit.

    Raises:
        UserError: naming settings that would make it fit.
    """
    available = min(part[0] for part in ranks.gather([available_bytes(workload.device)]))
    if workload.device.type == "cpu":
        available //= workload.processes  # which share the host's memory
    verdict, told = ranks.same(
        _memory_verdict(workload, available, otherwise) if ranks.rank == 0 else ("fits", "")
    )
    if verdict == "refused":
        raise UserError(told)
    if verdict == "fits":
        rank_zero_info(f"Memory: {told}.")
    else:
        rank_zero_warn(f"{told}.")


def _memory_verdict(
    workload: Workload, available: int, otherwise: Literal["refuse", "warn"]
) -> tuple[Literal["fits", "doubtful", "refused"], str]:
    """Return what becomes of a run, and why; a model that cannot be estimated is not in the way of its run."""
    try:
        estimator = Estimator(available)
        bound = estimator.bound(workload)
        if bound is not None and bound.fits:
            return "fits", f"at most {_gib(bound.fullest.total)} of the free {_gib(available)} will be needed"
        estimate = estimator.estimate(workload)
        phase = estimate.fullest
        need = f"{phase.name} will need about {_gib(phase.total)} of the free {_gib(available)}"
        if estimate.fits:
            return "fits", need
        if otherwise == "warn" or not estimate.measured:
            return "doubtful", f"This run may not fit: {need}; `sppo-lightning estimate` says what would help"
        rank_zero_info(f"Memory: {need}; looking for settings that make it fit (up to a minute).")
        return "refused", f"{objection(estimator, workload, estimate)}; or try it with data.memory_check=warn"
    except Exception as error:  # of any model's own code, on tensors without data
        return "doubtful", f"The run's memory could not be estimated ({first_line(error)})"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
