"""Histograms of difficulty and reward, called directly; in a whole fit they are tested in loggers/test_trackers.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.trackers import read_tensorboard

from sppo_lightning.callbacks import IterationHistograms
from sppo_lightning.difficulty import empty_difficulty_table, estimate_difficulty, reward_statistics
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Rollout

REWARDS = {"a": [0.0, 1.0, 5.0], "b": [2.0, 1e200]}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Two prompts, five responses, of which one has a reward that cannot be drawn."""
    found = RunFolder(tmp_path / "run")
    store = found.iteration(0)
    rows = [
        Rollout(prompt_id, sample, "say", "x", (5,), "stop", reward)
        for prompt_id, rewards in REWARDS.items()
        for sample, reward in enumerate(rewards)
    ]
    store.shards.write("probe", 0, rows)
    table = estimate_difficulty(
        reward_statistics({"a": [0.0, 1.0, 5.0], "b": [2.0]}),
        empty_difficulty_table(),
        iteration=0,
        smoothing=0,
    )
    store.write_difficulty(table, {"a"})
    return found


def begin_epoch(folder: RunFolder, logger: Any, *, steps_taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(folder=folder, steps_taken=steps_taken, current_iteration=0)
    monkeypatch.setattr("sppo_lightning.callbacks.histograms.self_play_data", lambda trainer: data)
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=7)
    IterationHistograms().on_train_epoch_start(trainer, cast(Any, None))


def test_every_difficulty_and_reward_is_counted(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = TensorBoardLogger(save_dir=tmp_path, name="", version="t")
    begin_epoch(folder, logger, steps_taken=0, monkeypatch=monkeypatch)
    logger.finalize("success")
    assert read_tensorboard(tmp_path / "t").histograms == {
        "iteration/difficulty": {7: 2},
        "iteration/reward": {7: 4},
    }


def test_nothing_is_logged_inside_an_iteration(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = TensorBoardLogger(save_dir=tmp_path, name="", version="t")
    begin_epoch(folder, logger, steps_taken=1, monkeypatch=monkeypatch)
    assert not (tmp_path / "t").exists()


def test_loggers_that_get_metrics_only_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("sppo_lightning.callbacks.histograms.rank_zero_info", said.append)
    loggers = [
        CSVLogger(tmp_path),
        MetricsCSV(tmp_path / "metrics.csv"),
        TensorBoardLogger(save_dir=tmp_path, name=""),
    ]
    trainer: Any = SimpleNamespace(loggers=loggers)
    for stage in ("fit", "validate"):
        IterationHistograms().setup(trainer, cast(Any, None), stage)
    assert [line.partition(":")[0] for line in said] == ["CSVLogger gets metrics only"]
