"""Which runs are compared, on outcomes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sppo_lightning.study.comparable import comparable
from sppo_lightning.study.outcomes import Evaluated, Numbers, Outcome
from sppo_lightning.study.plan import PlannedRun

PROMPTS = 40
INITIAL = np.linspace(0.0, 1.0, PROMPTS)


def outcome(arm: str, initial: Numbers, *, setting: str = "base") -> Outcome:
    run = PlannedRun(setting, 1, arm, {}, Path(arm))
    lengths = np.full(PROMPTS, 5.0)
    evaluations = (Evaluated(0, initial, lengths, 0), Evaluated(1, initial + 1.0, lengths, 10))
    return Outcome(run, tuple(f"p{n}" for n in range(PROMPTS)), evaluations, (0, 1), (12,), 0)


def moved(prompts: int, by: float = 0.5) -> Numbers:
    return INITIAL + by * (np.arange(PROMPTS) < prompts)


def test_equal_rewards_leave_nothing_to_say() -> None:
    unrewarded = np.where(np.arange(PROMPTS) == 3, np.nan, INITIAL)
    found = comparable([outcome("a", unrewarded), outcome("b", unrewarded.copy())])
    assert ([item.run.arm for item in found.kept], found.left_out, found.notes) == (["a", "b"], {}, ())


@pytest.mark.parametrize(("prompts", "kept"), [(1, True), (4, True), (5, False), (40, False)])
def test_a_tenth_of_the_prompts_may_differ(prompts: int, kept: bool) -> None:
    runs = [outcome("a", INITIAL), outcome("b", INITIAL), outcome("c", moved(prompts))]
    found = comparable(runs)
    assert [item.run.arm for item in found.kept] == ["a", "b", "c"][: 3 if kept else 2]
    assert list(found.left_out) == ([] if kept else [runs[2].run.name])
    assert len(found.notes) == kept
    if kept:
        assert f"in 1 of 3, up to {prompts} of 40 prompts differ from base/seed-1/a" in found.notes[0]


@pytest.mark.parametrize(("by", "noted"), [(1e-6, False), (0.0025, False), (0.0035, True)])
def test_rounding_is_a_hundredth_of_the_standard_deviation(by: float, noted: bool) -> None:
    assert 0.0025 < 0.01 * INITIAL.std() < 0.0035
    found = comparable([outcome("a", INITIAL), outcome("b", moved(2, by))])
    assert (len(found.kept), bool(found.notes)) == (2, noted)


def test_a_missing_reward_is_a_difference() -> None:
    found = comparable([outcome("a", INITIAL), outcome("b", np.full(PROMPTS, np.nan))])
    assert len(found.left_out) == 1


def test_rewards_that_are_all_equal_have_no_rounding() -> None:
    found = comparable([outcome("a", np.zeros(PROMPTS)), outcome("b", np.full(PROMPTS, 0.1))])
    assert len(found.left_out) == 1


def test_the_odd_one_out_is_left_out_even_if_it_is_the_first() -> None:
    runs = [outcome("odd", moved(30)), outcome("a", INITIAL), outcome("b", INITIAL)]
    found = comparable(runs)
    assert found.left_out == {
        "base/seed-1/odd": "gives the initial policy's answers other rewards than base/seed-1/a does"
    }


def test_other_held_out_prompts() -> None:
    other = replace(outcome("c", INITIAL), prompt_ids=tuple(f"q{n}" for n in range(PROMPTS)))
    found = comparable([outcome("a", INITIAL), outcome("b", INITIAL), other])
    assert found.left_out == {"base/seed-1/c": "was measured on other held-out prompts than base/seed-1/a"}


def test_settings_are_not_compared_with_each_other() -> None:
    found = comparable([outcome("a", INITIAL), outcome("a", moved(40), setting="small")])
    assert (len(found.kept), found.left_out, found.notes) == (2, {}, ())
