"""Does a run fit its devices: asked before any weights load, and answered alike for all processes."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.memory.advice import diagnosis
from sppo_lightning.memory.estimate import GIB, Estimator, available_bytes
from sppo_lightning.memory.workload import Workload
from sppo_lightning.types import Ranks, UserError, first_line

Outcome = Literal["fits", "may not fit", "refused"]


def check_memory(workload: Workload, ranks: Ranks, *, otherwise: Literal["refuse", "warn"]) -> None:
    """Compare what a run will need with what its devices have: one answer for all processes.

    Args:
        workload: the run.
        ranks: the processes.
        otherwise: what to do with a run that does not fit.

    Raises:
        UserError: naming settings that would make it fit.
    """
    available = min(part[0] for part in ranks.gather([available_bytes(workload.hardware.device)]))
    if workload.hardware.device.type == "cpu":
        available //= workload.hardware.processes  # which share the host's memory
    outcome, message = ranks.same(
        _outcome(workload, available, otherwise) if ranks.rank == 0 else ("fits", "")
    )
    if outcome == "refused":
        raise UserError(message)
    if outcome == "fits":
        rank_zero_info(f"Memory: {message}.")
    else:
        rank_zero_warn(f"{message}.")


def _outcome(workload: Workload, available: int, otherwise: Literal["refuse", "warn"]) -> tuple[Outcome, str]:
    """Return what becomes of a run, and why; a model that cannot be estimated is not in the way of its run."""
    try:
        estimator = Estimator(available)
        most = estimator.at_most(workload)
        if most is not None and most.fits:
            return "fits", f"at most {_gib(most.fullest.total)} of the free {_gib(available)} will be needed"
        estimate = estimator.estimate(workload)
        phase = estimate.fullest
        need = f"{phase.name} will need about {_gib(phase.total)} of the free {_gib(available)}"
        if estimate.fits:
            return "fits", need
        if otherwise == "warn" or not estimate.passes.measured:
            message = f"This run may not fit: {need}; `sppo-lightning estimate` says what would help"
            return "may not fit", message
        rank_zero_info(f"Memory: {need}; looking for settings that make it fit (up to a minute).")
        message = f"{diagnosis(estimator, workload, estimate)}; or try it with data.memory_check=warn"
        return "refused", message
    except Exception as error:  # of any model's own code, on fake tensors
        return "may not fit", f"The run's memory could not be estimated ({first_line(error)})"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
