"""The callbacks and loggers that a run has beside those of its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from sppo_lightning.callbacks import (
    DisplacementWarning,
    GradientNorm,
    InitialEvaluation,
    IterationGate,
    IterationHistograms,
    LearningDiagnostics,
    PhaseMemory,
    PhaseTimes,
    PolicyExport,
    ReportFile,
    RunCheckpoint,
    RunSummary,
    SampleTable,
    SelfPlayProgress,
    WeightUpdateCheck,
)
from sppo_lightning.callbacks.environment import EnvironmentFile
from sppo_lightning.callbacks.run_config import RunConfigFile
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.store.run_folder import RunFolder

DEFAULT_CALLBACKS = (
    PhaseTimes,
    PhaseMemory,
    InitialEvaluation,
    WeightUpdateCheck,
    LearningDiagnostics,
    DisplacementWarning,
    GradientNorm,
    IterationHistograms,
    SampleTable,
    PolicyExport,
    ReportFile,
    RunSummary,
)


def with_default_callbacks(
    given: Sequence[Callback], run_config: str, *, progress: bool, checkpoint: bool
) -> list[Callback]:
    """Return a config's callbacks with those that a run has by default; one of the same class replaces it.

    Args:
        given: by the config.
        run_config: text of the run's ``config.yaml``.
        progress: whether there is a progress bar.
        checkpoint: whether the run can be resumed.
    """
    defaults: list[Callback] = [kind() for kind in DEFAULT_CALLBACKS]
    if progress:
        defaults.append(SelfPlayProgress())
    if checkpoint:
        defaults.append(RunCheckpoint())  # in addition to a user's own: the run resumes from it
    defaults += [EnvironmentFile(), RunConfigFile(run_config)]
    found = list(given)
    for item in defaults:
        kind = ProgressBar if isinstance(item, ProgressBar) else type(item)
        if not any(isinstance(other, kind) for other in found):
            found.append(item)
    return sorted(found, key=_place)


def _place(callback: Callback) -> int:
    """Return where a callback stands: the gate before what exports and saves, the report after what it reads."""
    return isinstance(callback, ReportFile) - isinstance(callback, IterationGate)


def given_loggers(given: Any) -> list[Logger]:
    """Return the loggers that ``trainer.logger`` names; a bool names none."""
    if given is None or isinstance(given, bool):
        return []
    return list(given) if isinstance(given, list) else [given]


def with_default_loggers(given: Any, folder: RunFolder) -> list[Logger]:
    """Return the loggers of ``fit``: those named, TensorBoard where nothing is said, and the run's ``metrics.csv``.

    Args:
        given: value of ``trainer.logger``.
        folder: the run's.
    """
    found = given_loggers(given)
    if given is None or given is True:
        found.append(TensorBoardLogger(save_dir=folder.root, name="", version="tensorboard"))
    return [*found, MetricsCSV(folder.metrics)]
