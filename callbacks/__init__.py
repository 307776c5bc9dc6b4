"""Callbacks of the self-play loop."""

if __name__ != "sppo_lightning.callbacks":
    raise ImportError(
        f"this folder is the package sppo_lightning.callbacks, not {__name__}: import it under that name"
    )

from sppo_lightning.callbacks.checkpoint import RunCheckpoint
from sppo_lightning.callbacks.difficulty import DifficultyReestimation
from sppo_lightning.callbacks.export import PolicyExport
from sppo_lightning.callbacks.memory import PhaseMemory
from sppo_lightning.callbacks.progress import SelfPlayProgress
from sppo_lightning.callbacks.samples import SampleTable
from sppo_lightning.callbacks.summary import RunSummary
from sppo_lightning.callbacks.times import PhaseTimes

__all__ = [
    "DifficultyReestimation",
    "PhaseMemory",
    "PhaseTimes",
    "PolicyExport",
    "RunCheckpoint",
    "RunSummary",
    "SampleTable",
    "SelfPlayProgress",
]
