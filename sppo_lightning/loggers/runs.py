"""Remembers which run of each tracker a run logs to, so that a resumed one goes on there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from sppo_lightning.loggers.settings import TRACKERS, loggers_of
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import write_atomically


def record_runs(folder: RunFolder, loggers: Sequence[Logger]) -> None:
    """Write ``loggers.json``: the trackers' runs, in the order of ``trainer.logger``.

    Args:
        folder: of the run.
        loggers: the Trainer's, started.
    """
    runs = [
        {"logger": type(logger).__name__, "run": logger.version}
        for logger in loggers
        if isinstance(logger, tuple(TRACKERS))
    ]
    if runs:
        write_atomically(folder.loggers, json.dumps(runs, indent=1).encode())


def continue_runs(folder: RunFolder, given: Any) -> None:
    """Let loggers go on with the runs that ``loggers.json`` names, where the config names none.

    Nothing changes where the file is missing or damaged, or where ``trainer.logger`` has other loggers now.

    Args:
        folder: of the run.
        given: the value of ``trainer.logger``, as the parser has it; gets arguments.
    """
    try:
        runs = [(str(item["logger"]), str(item["run"])) for item in json.loads(folder.loggers.read_bytes())]
    except (OSError, ValueError, TypeError, LookupError):
        return
    known = [logger for logger in loggers_of(given) if logger.tracker is not None]
    if [logger.class_path.rpartition(".")[2] for logger in known] != [name for name, _ in runs]:
        return
    for logger, (_, run) in zip(known, runs, strict=True):
        if logger.tracker is not None and not any(map(logger.arguments.get, logger.tracker.run)):
            logger.given["init_args"][logger.tracker.run[0]] = run
