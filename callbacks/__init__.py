"""Callbacks of the self-play loop."""

if __name__ != "sppo_lightning.callbacks":
    raise ImportError(
        f"this folder is the package sppo_lightning.callbacks, not {__name__}: import it under that name"
    )

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.callbacks.checkpoint import RunCheckpoint
from sppo_lightning.callbacks.diagnostics import LearningDiagnostics
from sppo_lightning.callbacks.difficulty import DifficultyReestimation
from sppo_lightning.callbacks.displacement import DisplacementWarning
from sppo_lightning.callbacks.export import PolicyExport
from sppo_lightning.callbacks.gate import IterationGate
from sppo_lightning.callbacks.gradient_norm import GradientNorm
from sppo_lightning.callbacks.histograms import IterationHistograms
from sppo_lightning.callbacks.initial_evaluation import InitialEvaluation
from sppo_lightning.callbacks.memory import PhaseMemory
from sppo_lightning.callbacks.progress import SelfPlayProgress
from sppo_lightning.callbacks.report import ReportFile
from sppo_lightning.callbacks.samples import SampleTable
from sppo_lightning.callbacks.summary import RunSummary
from sppo_lightning.callbacks.times import PhaseTimes
from sppo_lightning.callbacks.weight_updates import WeightUpdateCheck

__all__ = [
    "DifficultyReestimation",
    "DisplacementWarning",
    "GradientNorm",
    "InitialEvaluation",
    "IterationGate",
    "IterationHistograms",
    "LearningDiagnostics",
    "PhaseMemory",
    "PhaseTimes",
    "PolicyExport",
    "ReportFile",
    "RunCheckpoint",
    "RunSummary",
    "SampleTable",
    "SelfPlayCallback",
    "SelfPlayProgress",
    "WeightUpdateCheck",
]
