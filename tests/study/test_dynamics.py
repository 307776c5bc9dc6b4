"""What runs logged of their pairs at each step, by iteration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.study.definition import Arm, Study
from sppo_lightning.study.dynamics import read_training, training_rows, training_section
from sppo_lightning.study.outcomes import Evaluated, Outcome
from sppo_lightning.study.plan import PlannedRun


def logged(path: Path, ratios: list[list[float]], *, reference: bool = True) -> Path:
    """Write a run's metrics: the chosen log-ratios of each iteration's steps, and what lies between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = MetricsCSV(path)
    step = 0
    for iteration, of_steps in enumerate(ratios):
        metrics.log_metrics(
            {"iteration/number": float(iteration), "iteration/pairs/gap": 0.5 + iteration}, step
        )
        metrics.log_metrics({"train/weights_moved": 1.0}, step + 1)
        for ratio in of_steps:
            row = {"train/loss": 1.0, "train/rewards/margin": 0.1, "train/rewards/accuracy": 0.75}
            row |= {"train/grad_norm": 2.0}
            if reference:
                row |= {"train/logratios/chosen": ratio, "train/logratios/rejected": 2 * ratio}
                row |= {"train/logratios/chosen_fell": float(ratio < 0)}
            metrics.log_metrics(row, step)
            step += 1
        metrics.log_metrics({"val/reward/mean": 0.3}, step)
    return path


def test_steps_belong_to_the_iteration_before_them(tmp_path: Path) -> None:
    rows = read_training(logged(tmp_path / "metrics.csv", [[0.0, -1.0, -5.0, -2.0], [0.0, 3.0]]))
    assert [(row["iteration"], row["steps"]) for row in rows] == [(0, 4), (1, 2)]
    first, second = rows
    assert (first["logratio_chosen"], first["lowest_logratio_chosen"]) == (-2.0, -5.0)
    assert (first["logratio_rejected"], first["chosen_fell"]) == (-4.0, 0.75)
    assert (first["margin"], first["accuracy"]) == (pytest.approx(0.1), 0.75)
    assert (first["gap"], second["gap"]) == (0.5, 1.5)
    assert (second["logratio_chosen"], second["lowest_logratio_chosen"]) == (1.5, 0.0)


def test_a_loss_without_a_reference_has_no_log_ratios(tmp_path: Path) -> None:
    (row,) = read_training(logged(tmp_path / "metrics.csv", [[0.0]], reference=False))
    assert math.isnan(float(str(row["logratio_chosen"])))
    assert row["margin"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"step,train/loss\n0,x\n", b"step,train/loss\n0,1,2,3\n"]
)
def test_a_damaged_file_gives_no_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    assert read_training(path) == []
    assert read_training(tmp_path / "none.csv") == []


def test_the_page_averages_over_seeds(tmp_path: Path) -> None:
    one = Evaluated(0, np.zeros(1), np.zeros(1), 0)
    outcomes = []
    for seed, ratios in ((1, [0.0, -2.0]), (2, [0.0, -4.0])):
        logged(tmp_path / str(seed) / "metrics.csv", [ratios])
        run = PlannedRun("base", seed, "a", {}, tmp_path / str(seed))
        outcomes.append(Outcome(run, ("p",), (one, one), (0, 1), (1,), 0))
    outcomes.append(
        Outcome(PlannedRun("base", 3, "a", {}, tmp_path / "gone"), ("p",), (one, one), (0, 1), (1,), 0)
    )
    study = Study("s", "Which?", ["x"], {"a": Arm(title="A|x")}, [1, 2])
    rows = training_rows(outcomes)
    assert [row["seed"] for row in rows] == [1, 2]
    lines = list(training_section(study, rows))
    assert "| A\\|x | 0 | 0.50 | -1.50 | -4.00 | 50% | -3.00 | +0.10 | 75% | 2.00 |" in lines
    assert not list(training_section(study, []))
