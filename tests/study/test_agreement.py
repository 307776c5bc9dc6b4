"""Agreement of difficulties, from the files that made-up runs left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sppo_lightning.difficulty import empty_difficulty_table, estimate_difficulty, reward_statistics
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.agreement import Agreement, agreement_section, agreements
from sppo_lightning.study.definition import Arm, Study
from sppo_lightning.study.outcomes import Evaluated, Outcome
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.types import Rollout

stats = pytest.importorskip("scipy.stats")
PROMPTS = 40
Rewards = Mapping[str, Sequence[float]]


def drawn(draw: int, samples: int, *, noise: float = 0.5, skill: float = 0.0) -> dict[str, list[float]]:
    """Prompts from hard to easy, each sample with noise of its own."""
    generator = np.random.default_rng(draw)
    return {
        f"p{n:02d}": list(n / PROMPTS + skill + noise * generator.standard_normal(samples))
        for n in range(PROMPTS)
    }


def ran(
    root: Path,
    probes: Sequence[Rewards],
    *,
    setting: str = "base",
    seed: int = 1,
    arm: str = "a",
    text: Callable[[str], str] = "say {}".format,
    data: Mapping[str, Any] | None = None,
) -> Outcome:
    """A run that has ended: what each iteration probed; a prompt that is not probed keeps its estimate."""
    run = PlannedRun(setting, seed, arm, {"data": dict(data or {})}, root / setting / f"seed-{seed}" / arm)
    known = empty_difficulty_table()
    for iteration, rewards in enumerate(probes):
        store = RunFolder(run.folder).iteration(iteration)
        rows = [
            Rollout(key, sample, text(key), "an answer", (1, 2), "stop", reward)
            for key, values in rewards.items()
            for sample, reward in enumerate(values)
        ]
        store.shards.write("probe", 0, rows)
        newer = estimate_difficulty(reward_statistics(rewards), known, iteration=iteration, smoothing=0.0)
        known = known.updated(newer)
        store.write_difficulty(known, set())
    one = Evaluated(0, np.zeros(1), np.zeros(1), 0)
    return Outcome(
        run, ("e",), (one,) * (len(probes) + 1), tuple(range(len(probes) + 1)), (9,) * len(probes), 0
    )


def study(*settings: str, **changes: Any) -> Study:
    arms = {"a": Arm(title="A|x"), "b": Arm()}
    return Study("s", "Which?", ["x"], arms, [1, 2], {name: {} for name in settings or ("base",)}, **changes)


def of_kind(kind: str, rows: Sequence[Agreement]) -> list[Agreement]:
    return [row for row in rows if row.kind == kind]


def means(rewards: Rewards, part: slice = slice(None)) -> list[float]:
    return [float(np.mean(values[part])) for values in rewards.values()]


def test_between_iterations_only_fresh_estimates_count(tmp_path: Path) -> None:
    """Iteration 1 estimates the first 20 prompts anew: the other 20 would agree with themselves."""
    first, again = drawn(1, 2), drawn(2, 2, skill=0.3)
    half = {key: again[key] for key in list(again)[:20]}
    (row,) = of_kind("iterations", agreements(study(), [ran(tmp_path, [first, half])]))
    assert (row.arm, row.first, row.second, row.prompts) == ("a", "iteration 0", "iteration 1", 20)
    expected = stats.spearmanr(means(first)[:20], means(half)).statistic
    assert row.value == pytest.approx(expected)
    assert row.low < expected < row.high
    static = ran(tmp_path, [first, {}], arm="b")
    assert not of_kind("iterations", agreements(study(), [static]))


def test_seeds_are_averaged(tmp_path: Path) -> None:
    runs = [ran(tmp_path, [drawn(seed, 2), drawn(9 + seed, 2)], seed=seed) for seed in (1, 2)]
    (row,) = of_kind("iterations", agreements(study(), runs))
    each = [stats.spearmanr(means(drawn(seed, 2)), means(drawn(9 + seed, 2))).statistic for seed in (1, 2)]
    assert row.value == pytest.approx(np.mean(each))
    assert row.seeds == 2


def test_settings_are_compared_on_the_prompts_that_they_share(tmp_path: Path) -> None:
    """Ids alone do not make prompts the same."""
    ours, theirs = drawn(1, 2), drawn(2, 2)
    other_text = {"p00", "p01"}
    runs = [
        ran(tmp_path, [ours], setting="one"),
        ran(
            tmp_path,
            [theirs],
            setting="two",
            text=lambda key: ("ask " if key in other_text else "say ") + key,
        ),
    ]
    (row,) = of_kind("settings", agreements(study("one", "two"), runs))
    assert (row.first, row.second, row.prompts, row.arm) == ("one", "two", PROMPTS - 2, None)
    assert row.value == pytest.approx(stats.spearmanr(means(ours)[2:], means(theirs)[2:]).statistic)
    apart = [
        ran(tmp_path, [ours], setting="one"),
        ran(tmp_path, [theirs], setting="two", seed=2),
    ]
    assert not of_kind("settings", agreements(study("one", "two"), apart))


def test_few_answers_are_compared_with_the_others(tmp_path: Path) -> None:
    """The arm with 20 answers serves, not the one with 2; none of the N answers is among the others."""
    many = drawn(1, 20)
    runs = [ran(tmp_path, [drawn(2, 2)]), ran(tmp_path, [many], arm="b")]
    rows = of_kind("answers", agreements(study(), runs))
    assert [(row.first, row.second) for row in rows] == [
        ("2 answers", "18 others"),
        ("5 answers", "15 others"),
        ("10 answers", "10 others"),
    ]
    for row, number in zip(rows, (2, 5, 10), strict=True):
        expected = stats.spearmanr(means(many, slice(number)), means(many, slice(number, None))).statistic
        assert row.value == pytest.approx(expected)
    few = of_kind("answers", agreements(study(), [ran(tmp_path / "few", [drawn(1, 9)])]))
    assert [row.first for row in few] == ["2 answers"]  # five have four others only


def test_length_and_category(tmp_path: Path) -> None:
    rewards = drawn(1, 2)
    lines = [
        {"id": key, "prompt": f"say {key}", "topic": "hard" if number < 20 else "easy"}
        for number, key in enumerate(rewards)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ran(tmp_path, [rewards], text=lambda key: "x" * (60 - int(key[1:])), data={"prompts": str(file)})
    rows = agreements(study(category_field="topic"), [run])
    (length,) = of_kind("length", rows)
    expected = stats.spearmanr(means(rewards), [-n for n in range(PROMPTS)]).statistic
    assert length.value == pytest.approx(expected)
    (category,) = of_kind("category", rows)
    test = stats.kruskal(means(rewards)[:20], means(rewards)[20:])
    assert (category.value, category.p) == pytest.approx((test.statistic / (PROMPTS - 1), test.pvalue))
    assert category.measure == "epsilon²"
    assert not of_kind("category", agreements(study(), [run]))  # no prompt has a "category"
    file.unlink()
    assert not of_kind("category", agreements(study(category_field="other"), [run]))


def test_the_pages_lines(tmp_path: Path) -> None:
    runs = [ran(tmp_path, [drawn(1, 4), drawn(2, 4)])]
    text = "\n".join(agreement_section(study(), agreements(study(), runs)))
    assert "| base | A\\|x | iteration 0 | iteration 1 | 40 | 1 | +0." in text
    assert "| base | initial policy | 2 answers | 2 others | 40 | 1 | +0." in text
    assert not list(agreement_section(study(), []))


def test_what_is_gone_or_damaged_is_left_out(tmp_path: Path) -> None:
    run = ran(tmp_path, [drawn(1, 4), drawn(2, 4)])
    for path in run.run.folder.rglob("rollouts/*.parquet"):
        path.write_bytes(b"no table")
    rows = agreements(study(), [run])
    assert [row.kind for row in rows] == ["iterations"]
    assert not math.isnan(rows[0].value)
    for path in run.run.folder.rglob("difficulty.parquet"):
        path.write_bytes(b"no table")
    assert not agreements(study(), [run])
