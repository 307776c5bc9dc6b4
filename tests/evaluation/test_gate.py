"""What makes a policy a step back, and which one is the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sppo_lightning.evaluation.gate import (
    Decision,
    best_finished,
    read_decisions,
    steps_back,
    write_decisions,
)
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.types import Rollout, UserError


def answers(*rewards: float) -> list[Rollout]:
    return [Rollout(f"p{n}", 0, "", "", (7,), "stop", reward) for n, reward in enumerate(rewards)]


def decision(finished: int, action: str, best: int) -> Decision:
    return Decision(finished, action, (), best, 0.0, 0.0, 1.0, "a policy")


def evaluated(folder: RunFolder, finished: int, *rewards: float) -> None:
    write_rollouts(folder.evaluation(f"{finished:03d}") / "rollouts.parquet", answers(*rewards))


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
    assert found == ["val/response_length/growth is 1.6, over 1.5", "other is nan, over 0"]


def test_answers_that_fail_are_no_way_out() -> None:
    """The hard prompt of two has no reward any more: the others alone look better."""
    found, *_ = steps_back(answers(1.0, math.nan), answers(0.5, 0.1), {}, tolerance=1.0, bounds={})
    assert found == ["50.0% of its held-out answers have no reward, of the best so far 0.0%"]


def test_the_best_is_found_prompt_by_prompt(tmp_path: Path) -> None:
    """The third evaluation's mean over its own prompts is the highest, since a low one failed; it is no better."""
    folder = RunFolder(tmp_path)
    assert best_finished(folder, 3) is None
    evaluated(folder, 0, 1.0, 0.0)
    assert best_finished(folder, 3) == 0
    evaluated(folder, 1, 1.0, 0.5)
    evaluated(folder, 2, 1.0, math.nan)
    evaluated(folder, 3, 1.0, 0.5)  # the earliest of equals stays
    assert best_finished(folder, 3) == 1


def test_the_best_is_what_the_gate_accepted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for finished, reward in enumerate((0.1, 0.3, 0.5)):
        evaluated(folder, finished, reward, reward)
    write_decisions(folder, [decision(1, "accept", 1), decision(2, "revert", 1)])
    assert best_finished(folder, 2) == 1


def test_a_run_stands_where_it_reverted_to() -> None:
    assert decision(3, "revert", 1).policy == 1
    assert decision(3, "warn", 1).policy == 3


def test_decisions_are_stored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_decisions(folder) == []
    stored = [
        Decision(1, "accept", (), 1, 0.25, 0.125, 1.0, "one"),
        Decision(2, "revert", ("a", "b"), 1, -0.5, 0.1, 0.5, "two"),
    ]
    write_decisions(folder, stored)
    assert read_decisions(folder) == stored
    folder.gate.write_text("{}")
    with pytest.raises(UserError, match=r"gate\.json is damaged .*: restore it from a copy"):
        read_decisions(folder)
