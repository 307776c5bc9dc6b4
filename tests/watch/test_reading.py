"""A run as it is seen: its phases while it grows, what is damaged, what is not read twice."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sppo_lightning.evaluation.gate import Decision, write_decisions
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.watch import reading
from sppo_lightning.watch.progress import age
from sppo_lightning.watch.reading import RunReader
from sppo_lightning.watch.words import decisions_text, duration, sparkline, status


def age_by(root: Path, seconds: float) -> None:
    for path in (root, *root.rglob("*")):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_a_finished_run(finished: Path) -> None:
    view = RunReader(finished).read()
    assert status(view) == "finished: 3 of 3 iterations"
    assert [row.number for row in view.iterations] == [0, 1, 2]
    assert [result.finished for result in view.results] == [0, 1, 2, 3]
    assert len(view.losses) == 12
    assert (view.troubles, view.decisions, view.name) == ([], [], "finished")


def test_a_run_that_the_gate_has_stopped(killed: Path) -> None:
    write_decisions(RunFolder(killed), [Decision(1, "stop", ("its reward fell",), 0, -0.1, 0.1, 1.0, "a")])
    (killed / "iterations/001/manifest.json").unlink()
    assert status(RunReader(killed).read()) == "stopped by the gate: 1 of 3 iterations"


def test_a_run_in_training(killed: Path) -> None:
    for path in (killed, *killed.rglob("*")):
        os.utime(path)
    view = RunReader(killed).read()
    assert view.progress is not None
    assert view.progress[:4] == (1, "training", 3, 4)
    assert "iteration 1 of 3 · training · " in status(view)
    assert " 3/4 optimizer steps · about " in status(view)
    age_by(killed, 3 * 3600.0)
    assert status(RunReader(killed).read()).endswith("nothing new for 3 h 0 min: it may have stopped")


def test_a_run_of_fixed_steps(killed: Path) -> None:
    """Six steps of the first iteration, and three of the second."""
    config = killed / "config.yaml"
    config.write_text(re.sub(r"(?m)^data:$", "data:\n  steps_per_iteration: 6", config.read_text()))
    path = killed / "metrics.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if int(row["step"]) > 3:
            row["step"] = str(int(row["step"]) + 2)
    with path.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    now = RunReader(killed).read().progress
    assert now is not None
    assert now[:4] == (1, "training", 3, 6)


def trim(root: Path, *names: str) -> None:
    """Take files of the second iteration away, and say that it is not complete."""
    folder = root / "iterations/001"
    for name in names:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    store = RunFolder(root).iteration(1)
    store.write_manifest({**(store.read_manifest() or {}), "complete": False})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: shutil.rmtree(root / "iterations/001"), (1, "starting", 0)),
        (
            lambda root: trim(
                root, "difficulty.parquet", "pairs.parquet", "rollouts/topup*", "rollouts/*-00001*"
            ),
            (1, "probing", 10),
        ),
        (lambda root: trim(root, "pairs.parquet", "rollouts/topup-00001*"), (1, "generating", 5)),
        (
            lambda root: [trim(root, "pairs.parquet"), (root / "iterations/001/reference").mkdir()],
            (1, "reference", 0),
        ),
        (
            lambda root: [
                *(shutil.rmtree(root / name) for name in ("iterations", "evaluations")),
                (root / "metrics.csv").unlink(),
            ],
            (0, "evaluating", 0),
        ),
    ],
    ids=["starting", "probing", "generating", "reference", "evaluating"],
)
def test_phases_are_told_by_files(
    killed: Path, change: Callable[[Path], object], expected: tuple[int, str, int]
) -> None:
    change(killed)
    now = RunReader(killed).read().progress
    assert now is not None
    assert now[:3] == expected


def test_a_policy_that_is_being_evaluated(finished: Path) -> None:
    """All is trained, and the answers to the held-out prompts come in."""
    parts = finished / "evaluations/003/parts-abc"
    parts.mkdir()
    path = finished / "metrics.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    with path.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if not row["time/other"])
    (finished / "evaluations/003/rollouts.parquet").rename(parts / "greedy-00000.parquet")
    now = RunReader(finished).read().progress
    assert now is not None
    assert now[:4] == (2, "evaluating", 4, 4)


def test_what_has_not_changed_is_not_read_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RunReader(finished)
    first = reader.read()
    monkeypatch.setattr(reading, "held_out_results", None)
    monkeypatch.setattr(RunFolder, "iteration", lambda *_: pytest.fail("an iteration was read again"))
    monkeypatch.setattr(reading, "progress", lambda *_: None)
    monkeypatch.setattr(reading, "seconds_left", lambda *_: None)
    monkeypatch.setattr(reading, "age", lambda *_: 0.0)
    assert reader.read().results == first.results
    assert reader.read().iterations == first.iterations


def test_what_is_damaged_is_said_and_the_rest_is_shown(finished: Path) -> None:
    (finished / "iterations/001/manifest.json").write_text("{")
    (finished / "evaluations/002/rollouts.parquet").write_text("no table")
    (finished / "gate.json").write_text("[]")
    view = RunReader(finished).read()
    assert [row.number for row in view.iterations] == [0, 2]
    assert [result.finished for result in view.results] == [0, 1, 3]
    assert sorted(next(name for name in ("manifest", "gate") if name in line) for line in view.troubles) == [
        "gate",
        "manifest",
    ]


def test_where_a_run_stands_may_not_be_known(killed: Path) -> None:
    (killed / "iterations/001/manifest.json").write_text("{")
    view = RunReader(killed).read()
    assert status(view) == "where it stands cannot be read, see below"
    assert len(view.troubles) == 1


def test_decisions_of_the_gate(finished: Path) -> None:
    decisions = [
        Decision(1, "accept", (), 1, 0.1, 0.1, 1.0, "a"),
        Decision(2, "revert", ("its reward fell", "val/kl is 9"), 1, -0.1, 0.1, 0.5, "b"),
    ]
    write_decisions(RunFolder(finished), decisions)
    view = RunReader(finished).read()
    assert list(decisions_text(view.decisions)) == [
        "gate after 2 iteration(s): revert: its reward fell; val/kl is 9 (best: 1)"
    ]


def test_answers_that_come_in_are_news(finished: Path) -> None:
    age_by(finished, 3600.0)
    parts = finished / "evaluations/003/parts-abc"
    parts.mkdir()
    age_by(finished, 3600.0)
    (parts / "greedy-00000.parquet").touch()
    assert age(RunFolder(finished)) < 600


def test_files_may_go_while_they_are_looked_at(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a checkpoint is replaced, or an iteration is pruned."""
    monkeypatch.setattr(Path, "exists", lambda self, **_: True)
    folder = RunFolder(finished)
    folder.metrics.unlink()
    assert age(folder) >= 0


def test_words() -> None:
    assert [duration(seconds) for seconds in (4, 64, 7260, 200_000)] == [
        "4 s",
        "1 min 4 s",
        "2 h 1 min",
        "2 d 7 h",
    ]
    assert sparkline([0, 1, 2, float("nan")]) == "▁▅█"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=50)) == 50
