"""The logger that keeps every metric in one file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.metrics_csv import MetricsCSV

Log = tuple[int, dict[str, float]]


def log(path: Path, entries: Sequence[Log]) -> MetricsCSV:
    """Log in a process of its own, as far as the logger can tell."""
    logger = MetricsCSV(path)
    for step, metrics in entries:
        logger.log_metrics(metrics, step)
    return logger


def rows(path: Path) -> list[Log]:
    with path.open(newline="") as file:
        found = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [(int(row.pop("step")), {key: float(value) for key, value in row.items()}) for row in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def test_golden(path: Path) -> None:
    """A new column goes to the right, and the rows before leave it empty."""
    log(path, [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.25}), (2, {"val/reward": -1.0, "a": 3})])
    assert path.read_text() == "step,train/loss,a,val/reward\n1,0.5,,\n2,0.25,,\n2,,3.0,-1.0\n"


def test_every_row_is_on_disk_at_once(path: Path) -> None:
    logger = MetricsCSV(path)
    assert not path.exists()
    for step in range(3):
        logger.log_metrics({"loss": step}, step)
        assert rows(path)[-1] == (step, {"loss": step})


def test_values_come_back_exactly(path: Path) -> None:
    logger = MetricsCSV(path)
    logger.log_metrics({"a": 0.1 + 0.2, "b": torch.tensor(1.5), "c": float("inf"), "d": float("nan")}, 7)
    ((step, found),) = rows(path)
    assert step == 7
    assert repr(found) == repr({"a": 0.1 + 0.2, "b": 1.5, "c": float("inf"), "d": float("nan")})


def test_an_unknown_step_is_the_first(path: Path) -> None:
    MetricsCSV(path).log_metrics({"a": 1})
    assert rows(path) == [(0, {"a": 1})]


def test_what_lightning_asks_a_logger(path: Path) -> None:
    logger = MetricsCSV(path)
    logger.log_hyperparams({"beta": 0.1})
    assert (logger.name, logger.version, logger.experiment) == ("metrics", "", path)
    assert not path.exists()


def test_opening_a_file_changes_nothing(path: Path) -> None:
    log(path, [(1, {"a": 1}), (2, {"b": 2})])
    before = path.read_bytes()
    MetricsCSV(path)
    assert path.read_bytes() == before


def test_a_resume_truncates_rows_of_later_steps(path: Path) -> None:
    log(path, [(step, {"loss": step}) for step in range(1, 6)])
    log(path, [(3, {"loss": 30})])
    assert rows(path) == [(1, {"loss": 1}), (2, {"loss": 2}), (3, {"loss": 30})]


def test_a_resume_replaces_rows_of_the_same_step_with_the_same_columns_only(path: Path) -> None:
    log(path, [(1, {"loss": 1}), (2, {"loss": 2}), (2, {"reward": 5})])
    log(path, [(2, {"loss": 20})])
    assert rows(path) == [(1, {"loss": 1}), (2, {"reward": 5}), (2, {"loss": 20})]


def test_a_resume_keeps_its_own_rows_when_it_replaces_several(path: Path) -> None:
    entries: list[Log] = [(1, {"loss": 1}), (2, {"loss": 2}), (2, {"reward": 3}), (2, {"win": 4})]
    log(path, entries)
    log(path, entries[1:])
    assert rows(path) == entries


def test_a_resume_may_bring_new_columns(path: Path) -> None:
    log(path, [(1, {"loss": 1}), (2, {"loss": 2})])
    log(path, [(3, {"loss": 3, "extra": 9}), (4, {"loss": 4})])
    assert rows(path) == [(1, {"loss": 1}), (2, {"loss": 2}), (3, {"loss": 3, "extra": 9}), (4, {"loss": 4})]
    assert path.read_text().startswith("step,loss,extra\n")


def test_a_new_column_and_a_replaced_row_at_once(path: Path) -> None:
    log(path, [(1, {"loss": 1}), (2, {"loss": 2}), (3, {"loss": 3})])
    log(path, [(2, {"loss": 20, "extra": 1}), (3, {"loss": 30})])
    assert rows(path) == [
        (1, {"loss": 1}),
        (2, {"loss": 2}),
        (2, {"loss": 20, "extra": 1}),
        (3, {"loss": 30}),
    ]


def test_names_with_commas_and_quotes(path: Path) -> None:
    log(path, [(1, {'reward, "clean"': 1}), (2, {"b": 2})])
    log(path, [(3, {'reward, "clean"': 3})])
    assert rows(path) == [(1, {'reward, "clean"': 1}), (2, {"b": 2}), (3, {'reward, "clean"': 3})]


def test_a_crash_while_a_column_is_added_loses_no_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = log(path, [(1, {"a": 1})])
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.log_metrics({"b": 2}, 2)
    assert path.read_bytes() == before


@st.composite
def histories(draw: st.DrawFn) -> list[Log]:
    """A run's rows: steps never fall, and a step has a set of columns once."""
    keys = draw(
        st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from(["a", "b", "c", "ab", "bc"])),
            unique=True,
            max_size=10,
        )
    )
    keys.sort(key=lambda key: key[0])
    return [(step, dict.fromkeys(names, number + 0.5)) for number, (step, names) in enumerate(keys)]


@settings(max_examples=50, deadline=None)
@given(history=histories(), data=st.data())
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, history: list[Log], data: st.DataObject
) -> None:
    """Twice: killed after some row, and resumed from a checkpoint made at or before it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        log(folder / "whole.csv", history)
        resumed = 0
        for _ in range(2):
            killed = data.draw(st.integers(resumed, len(history)))
            log(folder / "parts.csv", history[resumed:killed])
            resumed = data.draw(st.integers(0, killed))
        log(folder / "parts.csv", history[resumed:])
    if history:
        whole, parts = (rows(folder / f"{name}.csv") for name in ("whole", "parts"))
        assert parts == whole == history
        assert (folder / "parts.csv").read_text() == (folder / "whole.csv").read_text()
