"""What makes a policy a step back, and which one is the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sppo_lightning.evaluation.gate import (
    Decision,
    best_result,
    read_decisions,
    steps_back,
    write_decisions,
)
from sppo_lightning.evaluation.held_out import PairedDifference
from sppo_lightning.evaluation.results import HeldOutResult
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Rollout


def answers(*rewards: float) -> list[Rollout]:
    return [Rollout(f"p{n}", 0, "", "", (7,), "stop", reward) for n, reward in enumerate(rewards)]


def decision(finished: int, action: str, best: int) -> Decision:
    return Decision(finished, action, (), best, 0.0, 0.0, 1.0)


def result(finished: int, reward: float) -> HeldOutResult:
    return HeldOutResult(finished, reward, 0.1, PairedDifference(0.0, 0.1, 4), 0.5, 9.0)


@pytest.mark.parametrize(("tolerance", "refused"), [(0.0, True), (0.99, True), (1.01, False)])
def test_a_fall_within_the_tolerance_passes(tolerance: float, refused: bool) -> None:
    """Differences -1, -1, 0, 0: mean -1/2, sample standard deviation 1/sqrt(3), standard error 1/sqrt(12).

    The fall is sqrt(3) = 1.73 standard errors; scaled tolerances lie around it.
    """
    now, best = answers(0.0, 0.0, 1.0, 1.0), answers(1.0, 1.0, 1.0, 1.0)
    reasons, mean, stderr = steps_back(now, best, {}, tolerance=tolerance * math.sqrt(3), bounds={})
    assert (mean, stderr) == (-0.5, pytest.approx(1 / math.sqrt(12)))
    assert bool(reasons) is refused
    if refused:
        assert reasons == ["its held-out reward is 0.500 ± 0.289 below the best so far"]


def test_a_gain_passes() -> None:
    assert steps_back(answers(1.0, 2.0), answers(0.0, 1.0), {}, tolerance=0.0, bounds={})[0] == []


def test_one_prompt_has_no_error_and_may_not_fall() -> None:
    assert steps_back(answers(0.5), answers(1.0), {}, tolerance=3.0, bounds={})[0]


def test_a_diagnostic_over_its_bound() -> None:
    found, *_ = steps_back(
        answers(1.0, 2.0),
        answers(0.0, 1.0),
        {"val/response_length/growth": 1.6, "val/kl/initial": 0.1, "other": math.nan},
        tolerance=1.0,
        bounds={"val/response_length/growth": 1.5, "val/kl/initial": 0.1, "other": 0.0, "unmeasured": 0.0},
    )
    assert found == ["val/response_length/growth is 1.6, over 1.5"]


def test_the_best_is_the_earliest_of_equals_that_was_not_refused() -> None:
    results = [result(0, 0.1), result(1, 0.3), result(2, 0.5), result(3, 0.3), result(4, math.nan)]
    assert best_result(results, []) == results[2]
    assert best_result(results, [decision(2, "revert", 1)]) == results[1]
    assert best_result(results[:1], []) == results[0]
    assert best_result([], []) is None


def test_a_run_stands_where_it_reverted_to() -> None:
    assert decision(3, "revert", 1).policy == 1
    assert decision(3, "warn", 1).policy == 3


def test_decisions_are_stored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_decisions(folder) == []
    stored = [
        Decision(1, "accept", (), 1, 0.25, 0.125, 1.0),
        Decision(2, "revert", ("a", "b"), 1, -0.5, 0.1, 0.5),
    ]
    write_decisions(folder, stored)
    assert read_decisions(folder) == stored
    folder.gate.write_text("{}")
    assert read_decisions(folder) == []
