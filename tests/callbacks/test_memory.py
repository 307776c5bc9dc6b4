"""Peak memory phase by phase: the callback called directly, then in a whole fit."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import PhaseMemory
from sppo_lightning.system import device_memory as memory
from sppo_lightning.system.device_memory import Peak, PeakMemory
from sppo_lightning.types import Phase, PhaseProgress

GIB = 2**30
NOTHING = cast(Any, None)  # arguments that the callback does not look at
linux = pytest.mark.skipif(
    not (memory.PROCESS / "clear_refs").exists(), reason="Linux tells a process's peak"
)


class Run:
    """A Trainer as the callback sees it, with a data module that is at an iteration's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, first_process: bool = True) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.data = SimpleNamespace(iteration_ends=True, current_iteration=0)
        monkeypatch.setattr("sppo_lightning.callbacks.base.self_play_data", lambda trainer: self.data)
        logger = SimpleNamespace(log_metrics=lambda metrics, step: self.logged.append((step, metrics)))
        self.trainer: Any = SimpleNamespace(
            is_global_zero=first_process,
            state=SimpleNamespace(fn="fit"),
            loggers=[logger],
            global_step=7,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        self.callback = PhaseMemory()
        self.callback.setup(self.trainer, NOTHING, "fit")

    def phase(self, name: Phase, work: Callable[[], object] = lambda: None) -> None:
        """Go through a phase of the data module, of two prompts."""
        for done in range(3):
            self.callback.on_phase_progress(self.trainer, PhaseProgress(name, 0, done, 2, done))
            if done == 0:
                work()

    def train(self, *batches: Callable[[], object]) -> None:
        """Go through an epoch."""
        self.callback.on_train_epoch_start(self.trainer, NOTHING)
        for number, batch in enumerate(batches):
            batch()
            self.callback.on_train_batch_end(self.trainer, NOTHING, None, NOTHING, number)

    def end(self) -> dict[str, float]:
        """End the iteration; return what was logged."""
        self.callback.on_train_epoch_end(self.trainer, NOTHING)
        step, metrics = self.logged.pop()
        assert (step, self.logged) == (7, [])
        return metrics


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peak | None]]:
    """What the device will say took the next stretches, GiB; 1 when there is nothing more."""
    told: list[Peak | None] = []
    monkeypatch.setattr(
        "sppo_lightning.callbacks.memory.PeakMemory",
        lambda device: SimpleNamespace(taken=lambda: told.pop(0) if told else Peak(GIB, None)),
    )
    yield told
    assert told == []


@linux
def test_what_a_phase_takes_is_logged_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 MiB while probing, 200 MiB in the second of three micro-batches; nothing else takes any."""
    run = Run(monkeypatch)
    run.phase("evaluating")
    run.phase("probing", lambda: torch.ones(300 * 2**20, dtype=torch.uint8))
    run.phase("scoring")
    run.train(lambda: None, lambda: torch.ones(200 * 2**20, dtype=torch.uint8), lambda: None)
    logged = {name.removeprefix("memory/"): 1024 * size for name, size in run.end().items()}
    assert list(logged) == ["other", "evaluating", "probing", "scoring", "training"]
    base = logged["scoring"]
    assert 100 < base < 4000
    assert logged["probing"] - base == pytest.approx(300, abs=20)
    assert logged["training"] - base == pytest.approx(200, abs=20)
    assert logged["other"] == pytest.approx(base, abs=20)
    assert logged["evaluating"] == pytest.approx(base, abs=20)


@pytest.mark.gpu
def test_the_peak_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    meter = PeakMemory(device)
    before = meter.taken()
    torch.ones(300 * 2**20, dtype=torch.uint8, device=device)
    during, after = meter.taken(), meter.taken()
    assert before is not None
    assert during is not None
    assert after is not None
    assert during.held - before.held == 300 * 2**20
    assert after.held == before.held
    assert during.reserved is not None
    assert during.reserved >= during.held


def test_the_largest_of_a_phases_stretches_counts(
    monkeypatch: pytest.MonkeyPatch, peaks: list[Peak | None]
) -> None:
    run = Run(monkeypatch)
    sizes = [1.0, 5.0, 2.0, 3.0, 4.0, 6.0, 7.0, 6.5, 2.5]
    peaks += [Peak(int(size * GIB), int((size + 2) * GIB)) for size in sizes]
    run.phase("scoring")  # 1 before it, 5 in it
    run.phase("scoring")  # 2 before it, 3 in it
    run.train(lambda: None, lambda: None, lambda: None)  # 4 before it
    assert run.end() == {
        "memory/other": 4.0,
        "memory/scoring": 5.0,
        "memory/training": 7.0,
        "memory/reserved": 9.0,
    }


def test_an_iteration_forgets_the_one_before_and_the_run_does_not(
    monkeypatch: pytest.MonkeyPatch, peaks: list[Peak | None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    run = Run(monkeypatch)
    peaks += [Peak(size * GIB, None) for size in (1, 8, 2, 1, 6, 3)]
    run.phase("probing")
    assert run.end() == {"memory/other": 2.0, "memory/probing": 8.0}
    run.phase("probing")
    assert run.end() == {"memory/other": 3.0, "memory/probing": 6.0}
    run.callback.on_fit_end(run.trainer, NOTHING)
    assert caplog.messages == ["Peak memory on cpu in GiB: other 3.00, probing 8.00."]


def test_nothing_is_logged_inside_an_iteration(
    monkeypatch: pytest.MonkeyPatch, peaks: list[Peak | None]
) -> None:
    run = Run(monkeypatch)
    run.data.iteration_ends = False
    run.train(lambda: None)
    run.callback.on_train_epoch_end(run.trainer, NOTHING)
    assert run.logged == []


def test_a_system_that_does_not_tell_logs_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, peaks: list[Peak | None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    run = Run(monkeypatch)
    peaks += [None] * 4
    run.phase("probing")
    run.train(lambda: None)
    peaks.append(None)
    run.callback.on_train_epoch_end(run.trainer, NOTHING)
    run.callback.on_fit_end(run.trainer, NOTHING)
    assert run.logged == []
    assert caplog.messages == []


def test_other_processes_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, first_process=False)
    run.phase("probing")
    run.train(lambda: None)
    run.callback.on_train_epoch_end(run.trainer, NOTHING)
    assert run.logged == []


def test_phases_of_other_commands_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.trainer.state.fn = "validate"
    run.phase("evaluating")
    assert "memory/evaluating" not in run.end()


@linux
def test_in_a_whole_fit_every_phase_has_a_peak(
    tiny_policy: Path, write_prompts: Callable[..., Path], tmp_path: Path
) -> None:
    evaluated = write_prompts("eval.jsonl", count=3, start=50)
    arguments = cli_arguments(tiny_policy, write_prompts(), tmp_path / "run", data__eval_prompts=evaluated)
    arguments.append("--trainer.callbacks=sppo_lightning.callbacks.PhaseMemory")
    main(["fit", *arguments])
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    times, sizes = (
        [
            {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
            for row in rows
            if f"{prefix}training" in row
        ]
        for prefix in ("time/", "memory/")
    )
    assert len(sizes) == 2
    assert [set(row) for row in sizes] == [set(row) for row in times]
    assert set(sizes[0]) == {
        "evaluating",
        "generating",
        "other",
        "probing",
        "reference",
        "scoring",
        "training",
    }
    assert all(0.1 < size < 8 for row in sizes for size in row.values())
