"""Callbacks that watch a run's training: called directly, and the initial evaluation in a whole fit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import cli_arguments
from torch import nn

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import DisplacementWarning, WeightUpdateCheck
from sppo_lightning.training.batching import StepSlot

LAST = StepSlot(step=4, steps=5, step_pairs=2, first_in_step=True, last_in_step=True)
NOTHING: Any = None  # arguments that a callback does not look at


def batch(slot: StepSlot) -> Any:
    return SimpleNamespace(slot=slot)


# ------------------------------------------------------------- DisplacementWarning


def displacement(caplog: pytest.LogCaptureFixture, slot: StepSlot, **ratios: float) -> list[str]:
    metrics = {f"train/logratios/{side}": torch.tensor(value) for side, value in ratios.items()}
    trainer: Any = SimpleNamespace(callback_metrics=metrics)
    with caplog.at_level("INFO"):
        DisplacementWarning().on_train_batch_end(trainer, NOTHING, None, batch(slot), 0)
    return caplog.messages


def test_both_responses_became_less_likely(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = displacement(caplog, LAST, chosen=-1.25, rejected=-3.5)
    assert "chosen responses lost 1.25 nat and rejected ones 3.50" in message


@pytest.mark.parametrize(
    ("slot", "ratios"),
    [
        (LAST, {"chosen": 0.5, "rejected": -3.5}),
        (LAST, {}),  # a loss without a reference
        (LAST._replace(step=3), {"chosen": -1.0, "rejected": -1.0}),
        (LAST._replace(last_in_step=False), {"chosen": -1.0, "rejected": -1.0}),
    ],
)
def test_nothing_is_said_else(
    caplog: pytest.LogCaptureFixture, slot: StepSlot, ratios: dict[str, float]
) -> None:
    assert displacement(caplog, slot, **ratios) == []


def steps_said(caplog: pytest.LogCaptureFixture, *chosen: float, **settings: Any) -> list[str]:
    """What is said at the steps of an iteration with these chosen log-ratios, and of a second one after it."""
    callback = DisplacementWarning(**settings)
    for _ in range(2):
        for number, value in enumerate(chosen):
            ratios = {
                f"train/logratios/{side}": torch.tensor(ratio)
                for side, ratio in (("chosen", value), ("rejected", 9.0))
            }
            trainer: Any = SimpleNamespace(callback_metrics=ratios)
            slot = LAST._replace(step=number, steps=len(chosen))
            with caplog.at_level("INFO"):
                callback.on_train_batch_end(trainer, NOTHING, None, batch(slot), 0)
    return caplog.messages


def test_a_fall_is_named_in_its_first_steps_once_an_iteration(caplog: pytest.LogCaptureFixture) -> None:
    """Means of two steps: -2, -5, -8; the bound of 4 is passed at the third step."""
    found = steps_said(caplog, -1.0, -3.0, -7.0, -9.0, max_drop=4.0, steps=2)
    assert [text.split(":")[0] for text in found] == ["Step 3 of 4 of this iteration"] * 2
    assert "chosen responses have lost 5.0 nat on average over the last 2 step(s)" in found[0]


def test_a_single_bad_step_is_no_fall(caplog: pytest.LogCaptureFixture) -> None:
    assert steps_said(caplog, 0.0, -7.0, 0.0, -7.0, max_drop=4.0, steps=2) == []


# --------------------------------------------------------------- WeightUpdateCheck


class Fit:
    """A Trainer at its start, with a module of two layers."""

    def __init__(self, *, precision: str = "32-true", global_step: int = 0) -> None:
        self.logged: list[dict[str, float]] = []
        logger = SimpleNamespace(log_metrics=lambda metrics, step: self.logged.append(metrics))
        self.trainer: Any = SimpleNamespace(global_step=global_step, precision=precision, loggers=[logger])
        self.module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4, bias=False))
        self.callback = WeightUpdateCheck()
        self.callback.on_train_start(self.trainer, self.module)

    def step(self, change: float, slot: StepSlot = LAST) -> None:
        with torch.no_grad():
            self.module[1].weight[0] += change  # two of the eight weights of the largest matrix
        self.callback.on_train_batch_end(self.trainer, self.module, None, batch(slot), 0)


def test_the_share_of_moved_weights_is_logged_once() -> None:
    run = Fit()
    run.step(1.0, LAST._replace(last_in_step=False))
    assert run.logged == []
    run.step(1.0)
    run.step(1.0)
    assert run.logged == [{"train/weights_moved": 0.25}]


def test_a_first_step_that_moves_nothing_is_warned_about() -> None:
    run = Fit()
    with pytest.warns(
        UserWarning, match=r"The first optimizer step moved no weight: raise model\.learning_rate"
    ):
        run.step(0.0)
    assert run.logged == [{"train/weights_moved": 0.0}]


def test_steps_that_a_gradient_scaler_skips_do_not_count() -> None:
    run = Fit(precision="16-mixed")
    run.step(0.0)
    assert run.logged == []
    run.step(1.0)
    assert run.logged == [{"train/weights_moved": 0.25}]


def test_a_resumed_run_is_not_looked_at() -> None:
    run = Fit(global_step=3)
    run.step(1.0)
    assert run.logged == []


# --------------------------------------------------------------- InitialEvaluation


@pytest.mark.filterwarnings("ignore")
def test_the_initial_policy_is_logged_before_the_first_step(
    tiny_policy: Path, write_prompts: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"data__eval_prompts": write_prompts("eval.jsonl", count=3, start=50), "data__iterations": 1}
    main(["fit", *cli_arguments(tiny_policy, write_prompts(), tmp_path / "run", **settings)])
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["val/reward/mean"]]
    assert [row["step"] == "0" for row in measured] == [True, False]
    assert float(measured[0]["val/win_rate"]) == 0.5  # against itself
    assert rows.index(measured[0]) < next(n for n, row in enumerate(rows) if row["train/loss"])
    assert [float(row["train/weights_moved"]) > 0 for row in rows if row["train/weights_moved"]] == [True]
