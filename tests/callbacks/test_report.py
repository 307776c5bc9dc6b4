"""ReportFile, called directly."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.made_runs import MadeRun

import sppo_lightning.callbacks.report
from sppo_lightning.callbacks import ReportFile, RunSummary
from sppo_lightning.types import Prompt


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").write()


def end_iteration(callback: ReportFile, made: MadeRun, iteration: int, *, dev: bool = False) -> None:
    prompts = [Prompt(f"p{number}", "", (), metadata={"category": "maths"}) for number in range(12)]
    data: Any = SimpleNamespace(
        folder=made.folder,
        rules=SimpleNamespace(iterations=5),
        prompt_sets=SimpleNamespace(read=lambda key: prompts),
    )
    trainer: Any = SimpleNamespace(fast_dev_run=dev)
    callback.on_iteration_end(trainer, data, iteration)


def test_it_writes_the_page_that_the_summary_names(made: MadeRun) -> None:
    assert "report.html" not in RunSummary().render(made.folder, 2)
    end_iteration(ReportFile(), made, 0)
    assert made.folder.report.read_bytes().startswith(b"<!doctype html>")
    assert f"{made.folder.report}   all of this in a browser" in RunSummary().render(made.folder, 2)


@pytest.mark.parametrize(("every", "written"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_it_is_written_every_so_often_and_at_the_end(made: MadeRun, every: int, written: list[int]) -> None:
    found = []
    for iteration in range(5):
        end_iteration(ReportFile(every_n_iterations=every), made, iteration)
        if made.folder.report.exists():
            found.append(iteration)
            made.folder.report.unlink()
    assert found == written


def test_a_dev_run_leaves_nothing(made: MadeRun) -> None:
    end_iteration(ReportFile(), made, 0, dev=True)
    assert not made.folder.report.exists()


def test_a_run_goes_on_without_its_report(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("a defect")

    monkeypatch.setattr(sppo_lightning.callbacks.report, "page_of", breaks)
    with pytest.warns(UserWarning, match=r"report.html could not be written \(a defect\): the run goes on"):
        end_iteration(ReportFile(), made, 0)


def test_a_report_in_the_way_is_no_end(made: MadeRun) -> None:
    made.folder.report.mkdir()
    (made.folder.report / "mine").touch()
    with pytest.warns(UserWarning, match="could not be written"):
        end_iteration(ReportFile(), made, 0)


def test_a_full_disk_is_for_others_to_say(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="report.html could not be written .*make room"):
        end_iteration(ReportFile(), made, 0)


@pytest.mark.parametrize(("name", "value"), [("every_n_iterations", -1), ("max_megabytes", 0.0)])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"ReportFile.{name}={value} must be"):
        ReportFile(**{name: value})
