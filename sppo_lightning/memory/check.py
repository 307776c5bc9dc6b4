"""Does a run fit its devices: asked before any weights load, and answered alike for all processes."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.memory.advice import verdict as objection
from sppo_lightning.memory.estimate import GIB, Estimator, available_bytes
from sppo_lightning.memory.workload import Workload
from sppo_lightning.types import Ranks, UserError, first_line


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
