"""Held-out prompts by quartile of the initial policy's reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sppo_lightning.study.definition import Arm, Study
from sppo_lightning.study.outcomes import Evaluated, Outcome
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.study.quartiles import by_difficulty, flat, quartile_section, quartiles


def outcome(arm: str, seed: int, initial: Any, final: Any) -> Outcome:
    run = PlannedRun("base", seed, arm, {}, Path(arm))
    evaluations = tuple(
        Evaluated(number, np.asarray(rewards, float), np.full(len(rewards), 5.0), 10 * number)
        for number, rewards in enumerate((initial, final))
    )
    ids = tuple(f"p{number}" for number in range(len(initial)))
    return Outcome(run, ids, evaluations, (0, 1), (12,), 0)


def study(*arms: str) -> Study:
    return Study("s", "Which?", ["x"], {arm: Arm(title=f"arm|{arm}") for arm in arms}, [1, 2])


def test_equal_rewards_are_ordered_by_id() -> None:
    item = outcome("a", 1, [0.9, 0, 0, 0.5, 0, 0, np.nan, 0.5, 0], np.zeros(9))
    parts = [part.tolist() for part in by_difficulty([item])]
    assert parts == [[1, 2], [4, 5], [8, 3], [7, 0]]  # p6 has no reward


def test_an_arm_is_compared_with_the_first_one() -> None:
    """Eight prompts; B ends 0.4 higher than A on the two hardest, 0.1 lower on the two easiest."""
    initial = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    final_a = np.full(8, 0.5)
    final_b = final_a + np.array([0.3, 0.5, 0, 0, 0, 0, -0.1, -0.1])
    runs = [
        outcome(arm, seed, initial, final + 0.01 * seed)
        for seed in (1, 2)
        for arm, final in (("a", final_a), ("b", final_b))
    ]
    rows = quartiles(study("a", "b"), runs)
    assert [(row.arm, row.number) for row in rows] == [
        (arm, number) for arm in "ab" for number in (1, 2, 3, 4)
    ]
    assert [row.difference for row in rows[:4]] == [None] * 4
    found = [row.difference for row in rows[4:]]
    assert [each.mean for each in found if each is not None] == pytest.approx([0.4, 0.0, 0.0, -0.1])
    assert found[0] is not None
    assert found[0].low < 0.4 < found[0].high
    hardest = rows[0]
    assert (hardest.initial, hardest.final) == pytest.approx((0.05, 0.515))
    assert hardest.gain.mean == pytest.approx(0.465)
    assert flat(rows[4])["difference"] == pytest.approx(0.4)
    assert flat(rows[0])["difference"] is None


def test_seeds_are_paired() -> None:
    initial = np.linspace(0, 1, 8)
    runs = [outcome("a", 1, initial, initial), outcome("b", 1, initial, initial + 0.2)]
    runs += [outcome("b", 2, initial, initial + 9)]  # A has no second seed yet
    hardest = quartiles(study("a", "b"), runs)[4]
    assert hardest.difference is not None
    assert (hardest.difference.mean, hardest.difference.seeds) == (pytest.approx(0.2), 1)


def test_the_pages_lines() -> None:
    initial = np.linspace(0, 1, 8)
    runs = [outcome("a", 1, initial, initial), outcome("b", 1, initial, initial + 0.2)]
    text = "\n".join(quartile_section(study("a", "b"), quartiles(study("a", "b"), runs)))
    assert "regression to the mean" in text
    assert "id comes first counts as" in text
    assert "| quartile 1 (hardest), initially 0.071 |" in text
    assert "| arm\\|a | 0.071 at the end |" in text
    assert "| arm\\|b | +0.200 |" in text
    assert not list(quartile_section(study("a"), quartiles(study("a"), runs[:1])))
    assert not list(
        quartile_section(study("a", "b"), quartiles(study("a", "b"), runs[1:]))
    )  # the first is not there
    assert not list(quartile_section(study("a", "b"), []))
