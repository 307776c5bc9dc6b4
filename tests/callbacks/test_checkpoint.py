"""When a checkpoint is written, what it brings back, and what a signal waits for: in runs of one iteration."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import RunCheckpoint
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.system.signals import StopSignal
from sppo_lightning.types import Stopped

WritePrompts = Callable[..., Path]
Fit = Callable[..., Path]
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watching(pl.Callback):
    """Notes each checkpoint's step, and does what a test asks for at a micro-batch."""

    saved: list[int]
    draws: list[tuple[int, float, float, float]]
    act: Callable[[int, int], None]
    stop: StopSignal

    @classmethod
    def begin(cls, act: Callable[[int, int], None] = lambda step, batch: None) -> None:
        cls.saved, cls.draws, cls.act = [], [], staticmethod(act)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        Watching.stop = self_play_data(trainer).stop
        if batch is not None:
            drawn = random.random(), float(np.random.random()), float(torch.rand(()))
            Watching.draws.append((trainer.global_step, *drawn))
            Watching.act(trainer.global_step, batch_idx)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        Watching.saved.append(trainer.global_step)


@pytest.fixture
def fit(tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path) -> Iterator[Fit]:
    """Fit some 8 pairs, two a step in two micro-batches: four steps an epoch."""
    before = [signal.getsignal(number) for number in SIGNALS]
    prompts = write_prompts()

    def run(minutes: float = 10.0, held_out: bool = False, name: str = "run", **changes: Any) -> Path:
        callbacks = (
            '[{"class_path": "sppo_lightning.callbacks.RunCheckpoint", "init_args": {"every_n_minutes": '
            f'{minutes}}}}}, {{"class_path": "{__name__}.Watching"}}]'
        )
        settings = {
            "data__iterations": 1,
            "data__pairs_per_step": 2,
            "data__batch_size": 1,
            "trainer__callbacks": callbacks,
            **({"data__eval_prompts": write_prompts("eval.jsonl", count=3, start=50)} if held_out else {}),
            **changes,
        }
        main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / name, **settings)])
        return tmp_path / name

    Watching.begin()
    yield run
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def checkpoint(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return found


def send(*signals: signal.Signals, at: tuple[int, int]) -> Callable[[int, int], None]:
    """Send signals behind a micro-batch, given by the optimizer steps taken and its number in the epoch."""

    def act(step: int, batch: int) -> None:
        if (step, batch) == at:
            for number in signals:
                os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_between_checkpoints(minutes: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^RunCheckpoint\.every_n_minutes={minutes} must be greater than 0$"
    ):
        RunCheckpoint(every_n_minutes=minutes)


# ---------------------------------------------------------------------- when


def test_an_iteration_is_saved_at_its_end(fit: Fit) -> None:
    steps = checkpoint(fit())["global_step"]
    assert steps > 3
    assert Watching.saved == [steps]


def test_an_iteration_is_saved_before_its_evaluation_and_after(fit: Fit) -> None:
    steps = checkpoint(fit(held_out=True))["global_step"]
    assert Watching.saved == [steps, steps]


def test_every_step_is_saved_once(fit: Fit) -> None:
    """Not in its middle, and not before the first."""
    steps = checkpoint(fit(minutes=1e-9))["global_step"]
    assert Watching.saved == list(range(1, steps + 1))


def test_minutes_count_from_the_checkpoint_before(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a minute by this clock: two minutes are over behind every other step."""
    clock = [0.0]

    def tick(step: int, batch: int) -> None:
        clock[0] += 30

    Watching.begin(tick)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    steps = checkpoint(fit(minutes=2, data__selection__fraction=1.0))["global_step"]
    assert steps > 4
    assert Watching.saved == [*range(2, steps, 2), steps]


def test_a_dev_run_keeps_nothing(fit: Fit) -> None:
    run = fit(minutes=1e-9, trainer__fast_dev_run="true")
    assert Watching.saved == []
    assert not (run / "checkpoints").exists()


def test_without_checkpoints_a_run_still_stops(fit: Fit, tmp_path: Path) -> None:
    """``trainer.enable_checkpointing=false``, and none of ours: signals are obeyed at once."""
    Watching.begin(send(signal.SIGTERM, at=(1, 2)))
    with pytest.raises(SystemExit) as left:
        fit(
            trainer__enable_checkpointing="false",
            trainer__callbacks=f'[{{"class_path": "{__name__}.Watching"}}]',
        )
    assert left.value.code == 143
    assert not (tmp_path / "run/checkpoints").exists()


# ------------------------------------------------------------- what comes back


class StoppedHereError(RuntimeError):
    """Ends a run."""


def test_random_generators_go_on(fit: Fit) -> None:
    """For users' classes that draw from them."""
    fit(name="whole")
    whole = Watching.draws

    def end(step: int, batch: int) -> None:
        if step == 3:
            raise StoppedHereError

    Watching.begin(end)
    with pytest.raises(StoppedHereError):
        fit(minutes=1e-9)
    first = Watching.draws[
        : [draw[0] for draw in whole].index(3) - 1
    ]  # as far as the checkpoint behind step 2
    Watching.begin()
    fit(minutes=1e-9)
    assert first + Watching.draws == whole
    assert len({draw[1] for draw in whole}) == len(whole)


@pytest.mark.parametrize("ends_by", [StoppedHereError, signal.SIGTERM])
def test_a_run_that_ends_early_gives_the_signals_back(fit: Fit, ends_by: Any) -> None:
    """And takes them once more when its data module is used again, neither held back nor obeyed for the old one."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def end(step: int, batch: int) -> None:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        if ends_by is not StoppedHereError:
            os.kill(os.getpid(), ends_by)
        elif step == 1:
            raise StoppedHereError

    Watching.begin(end)
    with pytest.raises((StoppedHereError, SystemExit)):
        fit()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    stop = Watching.stop
    stop.listen()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    assert not stop.received
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    stop.ignore()


# -------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_step_waits_for_its_end(
    fit: Fit, tmp_path: Path, number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind the first of the second step's two micro-batches."""
    Watching.begin(send(number, at=(1, 2)))
    with pytest.raises(SystemExit) as left:
        fit()
    assert left.value.code == status
    assert Watching.saved == [2]
    found = checkpoint(tmp_path / "run")
    assert (found["global_step"], found["SelfPlayDataModule"]["pairs_consumed"]) == (2, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == (
        f"sppo-lightning: stopped by {number.name}. What is finished is on disk: the same command resumes from there."
    )


def test_a_second_signal_does_not_wait(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sppo_lightning.system.signals.SAME_SIGNAL_S", 0.0)
    Watching.begin(send(signal.SIGTERM, signal.SIGTERM, at=(1, 2)))
    with pytest.raises(SystemExit):
        fit()
    assert Watching.saved == []


def test_a_signal_where_a_checkpoint_is_due_saves_once(fit: Fit) -> None:
    Watching.begin(send(signal.SIGTERM, at=(2, 3)))
    with pytest.raises(SystemExit):
        fit(minutes=1e-9)
    assert Watching.saved == [1, 2]


def test_a_signal_in_the_last_step_of_an_epoch_loses_no_step(fit: Fit) -> None:
    """It waits for the next epoch's first step, which is not taken any more."""
    epoch = checkpoint(fit(name="whole"))["global_step"]

    def act(step: int, batch: int) -> None:
        if step == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    Watching.begin(act)
    with pytest.raises(SystemExit):
        fit(data__epochs_per_iteration=2)
    assert Watching.saved == [epoch]


def test_a_signal_in_an_iterations_last_step_stops_before_its_evaluation(fit: Fit, tmp_path: Path) -> None:
    steps = checkpoint(fit(name="whole"))["global_step"]

    def act(step: int, batch: int) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    Watching.begin(act)
    with pytest.raises(SystemExit):
        fit(held_out=True)
    assert Watching.saved == [steps]
    assert [path.name for path in (tmp_path / "run/evaluations").iterdir()] == ["000"]
