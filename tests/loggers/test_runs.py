"""Which run of a tracker a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.loggers.runs import continue_runs, record_runs
from sppo_lightning.store.run_folder import RunFolder

WANDB = "lightning.pytorch.loggers.WandbLogger"
MLFLOW = "lightning.pytorch.loggers.MLFlowLogger"
CSV = "lightning.pytorch.loggers.CSVLogger"
RUNS = [{"logger": "WandbLogger", "run": "w1"}, {"logger": "MLFlowLogger", "run": "m1"}]


def given(*paths: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{"class_path": path, "init_args": dict(arguments)} for path in paths]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has logged to W&B and MLflow."""
    found = RunFolder(tmp_path)
    found.loggers.write_text(json.dumps(RUNS))
    return found


def test_each_logger_goes_on_with_its_run(folder: RunFolder) -> None:
    loggers = given(CSV, WANDB, MLFLOW)
    continue_runs(folder, loggers)
    assert [logger["init_args"] for logger in loggers] == [{}, {"version": "w1"}, {"run_id": "m1"}]


@pytest.mark.parametrize("named", ["version", "id"])
def test_a_run_that_the_config_names_stays(folder: RunFolder, named: str) -> None:
    loggers = [*given(WANDB, **{named: "mine"}), *given(MLFLOW)]
    continue_runs(folder, loggers)
    assert loggers[0]["init_args"] == {named: "mine"}
    assert loggers[1]["init_args"] == {"run_id": "m1"}


def test_other_loggers_begin_anew(folder: RunFolder) -> None:
    for loggers in (given(MLFLOW, WANDB), given(WANDB), given(CSV), True, None):
        before = json.dumps(loggers)
        continue_runs(folder, loggers)
        assert json.dumps(loggers) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '[{"logger": "WandbLogger"}]', "null"])
def test_a_damaged_file_begins_anew(tmp_path: Path, content: str) -> None:
    folder, loggers = RunFolder(tmp_path), given(WANDB)
    folder.loggers.write_text(content)
    continue_runs(folder, loggers)
    assert loggers == given(WANDB)


def test_nothing_is_written_without_trackers(tmp_path: Path) -> None:
    record_runs(RunFolder(tmp_path), [])
    assert not RunFolder(tmp_path).loggers.exists()
