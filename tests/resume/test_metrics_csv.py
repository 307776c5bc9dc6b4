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

from sppo_lightning.resume.metrics_csv import MetricsCSV

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


def go_on(path: Path, kept: int, entries: Sequence[Log]) -> MetricsCSV:
    """Log in another process, behind a checkpoint that knew of ``kept`` rows."""
    logger = MetricsCSV(path)
    logger.resume_after(kept)
    for step, metrics in entries:
        logger.log_metrics(metrics, step)
    return logger


def test_without_a_checkpoint_the_file_begins_anew(path: Path) -> None:
    log(path, [(1, {"a": 1}), (2, {"b": 2})])
    log(path, [(0, {"c": 3})])
    assert path.read_text() == "step,c\n0,3.0\n"


def test_a_resume_keeps_the_rows_behind_the_checkpoint(path: Path) -> None:
    """By their number, not by their steps: a step has several rows, and a checkpoint may stand between two of them."""
    log(path, [(1, {"loss": 1}), (2, {"loss": 2}), (2, {"reward": 5}), (2, {"win": 4}), (3, {"loss": 3})])
    go_on(path, 3, [(2, {"win": 4}), (3, {"loss": 30})])
    assert rows(path) == [
        (1, {"loss": 1}),
        (2, {"loss": 2}),
        (2, {"reward": 5}),
        (2, {"win": 4}),
        (3, {"loss": 30}),
    ]


def test_rows_give_way_to_the_first_that_is_logged(path: Path) -> None:
    """A run that is refused after its checkpoint was read leaves the file as it was."""
    log(path, [(1, {"loss": 1}), (2, {"loss": 2, "win": 1})])
    before = path.read_bytes()
    go_on(path, 1, [])
    assert path.read_bytes() == before
    go_on(path, 1, [(2, {"loss": 3})])
    assert path.read_text() == "step,loss\n1,1.0\n2,3.0\n"


def test_a_resume_behind_no_row(path: Path) -> None:
    log(path, [(1, {"loss": 1})])
    go_on(path, 0, [(1, {"win": 1})])
    assert path.read_text() == "step,win\n1,1.0\n"


def test_a_resume_that_drops_nothing_changes_nothing(path: Path) -> None:
    log(path, [(1, {"a": 1}), (2, {"b": 2})])
    before = path.read_bytes(), path.stat().st_ino
    go_on(path, 2, [])
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_columns_come_in_the_order_of_an_uninterrupted_run(path: Path, tmp_path: Path) -> None:
    """A column that only dropped rows had is forgotten, and comes back where it first came."""
    history: list[Log] = [(1, {"loss": 1}), (2, {"z": 1}), (3, {"a": 1}), (4, {"z": 2})]
    log(tmp_path / "whole.csv", history)
    log(path, [(1, {"loss": 1}), (2, {"time": 9}), (3, {"a": 1})])
    go_on(path, 1, history[1:])
    assert path.read_text() == (tmp_path / "whole.csv").read_text()


def test_a_row_that_was_half_written_gives_way(path: Path) -> None:
    log(path, [(1, {"loss": 1, "win": 2}), (2, {"loss": 2, "win": 3})])
    for torn in ("3", "3,0.2", "3,0.25,0.1"):
        with path.open("a") as file:
            file.write(torn)
        go_on(path, 2, [(3, {"loss": 5})])
        assert rows(path) == [(1, {"loss": 1, "win": 2}), (2, {"loss": 2, "win": 3}), (3, {"loss": 5})]


def test_rows_that_are_lost_are_missed(path: Path) -> None:
    log(path, [(1, {"loss": 1})])
    with pytest.warns(
        UserWarning, match=r"metrics\.csv has only 1 of the 3 rows that the checkpoint counts\."
    ):
        logger = go_on(path, 3, [(4, {"loss": 4})])
    assert rows(path) == [(1, {"loss": 1}), (4, {"loss": 4})]
    assert logger.rows_on_disk() == 2


def test_a_lost_file_is_missed(path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has only 0 of the 2 rows"):
        go_on(path, 2, [(4, {"loss": 4})])
    assert rows(path) == [(4, {"loss": 4})]


def test_a_checkpoint_counts_the_rows_and_puts_them_on_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = MetricsCSV(path)
    assert logger.rows_on_disk() == 0
    logger.log_metrics({"a": 1}, 1)
    logger.log_metrics({"a": 2}, 2)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    assert logger.rows_on_disk() == 2
    assert synced == [str(path)]
    again = go_on(path, 1, [])
    assert again.rows_on_disk() == 1


def test_names_with_commas_and_quotes(path: Path) -> None:
    log(path, [(1, {'reward, "clean"': 1}), (2, {"b": 2})])
    go_on(path, 2, [(3, {'reward, "clean"': 3})])
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
    """A run's rows: steps never fall."""
    names = st.sampled_from(["a", "b", "c", "ab", "bc"])
    keys = draw(st.lists(st.tuples(st.integers(0, 4), names), max_size=10))
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
            go_on(folder / "parts.csv", resumed, history[resumed:killed])
            resumed = data.draw(st.integers(0, killed))
        go_on(folder / "parts.csv", resumed, history[resumed:])
    if history:
        whole, parts = (rows(folder / f"{name}.csv") for name in ("whole", "parts"))
        assert parts == whole == history
        assert (folder / "parts.csv").read_text() == (folder / "whole.csv").read_text()


def test_the_target_of_a_link_is_not_written_to(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    log(other, [(1, {"loss": 0.5})])
    before = other.read_bytes()
    path.symlink_to(other)
    logger = MetricsCSV(path)
    logger.resume_after(1)
    logger.log_metrics({"loss": 0.25}, 2)
    assert other.read_bytes() == before
    assert rows(path) == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
