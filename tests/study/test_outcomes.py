"""What runs came to, and what claims came to, on outcomes made by hand."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sppo_lightning.study import runner
from sppo_lightning.study.command import paced
from sppo_lightning.study.definition import Arm, Claim, Study
from sppo_lightning.study.outcomes import (
    Evaluated,
    InitialResponses,
    Outcome,
    prompt_table,
    read_outcome,
    shared_tokens,
)
from sppo_lightning.study.page import Results, write_results
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.study.runner import RunState
from sppo_lightning.study.verdicts import verdicts
from sppo_lightning.types import UserError

PROMPTS = 40


def outcome(
    arm: str, seed: int, rewards: list[Any], *, tokens: int = 100, held: tuple[int, ...] = ()
) -> Outcome:
    """A run whose evaluations have these rewards, ``tokens`` sampled in each iteration."""
    run = PlannedRun("base", seed, arm, {}, Path(f"{arm}-{seed}"))
    evaluations = tuple(
        Evaluated(
            number,
            np.broadcast_to(np.asarray(each, float), PROMPTS).copy(),
            np.full(PROMPTS, 5.0),
            number * tokens,
        )
        for number, each in enumerate(rewards)
    )
    had = held or tuple(range(len(rewards)))
    keys = np.arange(4 if arm == "a" else 6)
    return Outcome(
        **{"run": run, "prompt_ids": tuple(f"p{n}" for n in range(PROMPTS)), "evaluations": evaluations},
        **{"held": had, "pairs": (12,) * (len(rewards) - 1), "reverted": 0},
        initial=InitialResponses(f"policy, seed {seed}", keys, 10 + keys),
    )


def study(tmp_path: Path, **changes: Any) -> Study:
    claims = {"ab": Claim("A beats B.", "a", "b"), "up": Claim("A gains.", "a", "initial")}
    settings: dict[str, Any] = {"name": "s", "question": "Which?", "config": ["x"], "seeds": [1, 2, 3]}
    return Study(
        **{
            **settings,
            "arms": {"a": Arm(), "b": Arm(title="B|x")},
            "claims": claims,
            "output": str(tmp_path),
            **changes,
        }
    )


def test_gains() -> None:
    noise = np.linspace(-0.1, 0.1, PROMPTS)
    item = outcome("a", 1, [0.2 + noise, 0.1 + noise, 0.5 + noise])
    assert item.gain == pytest.approx(np.full(PROMPTS, 0.3))
    assert item.lowest_gain == pytest.approx(-0.1)
    assert (item.win_rate, item.length_ratio, item.tokens) == (1.0, 1.0, 200)
    reverted = outcome("a", 1, [0.2, 0.4, 0.1, 0.5], held=(0, 1, 1, 3))
    assert reverted.gain == pytest.approx(np.full(PROMPTS, 0.3))
    assert reverted.lowest_gain == pytest.approx(-0.1)
    assert reverted.gain_at(200) == pytest.approx(
        np.full(PROMPTS, 0.2)
    )  # the policy that was given up has no part
    same = outcome("a", 1, [0.2, 0.2])
    assert same.win_rate == 0.5


@pytest.mark.parametrize(
    ("tokens", "gain"), [(0, 0.0), (50, 0.1), (100, 0.2), (150, 0.25), (200, 0.3), (999, 0.3)]
)
def test_gain_at_a_number_of_tokens(tokens: int, gain: float) -> None:
    item = outcome("a", 1, [0.1, 0.3, 0.4])
    assert item.gain_at(tokens) == pytest.approx(np.full(PROMPTS, gain))


def test_a_reward_that_is_missing_stays_missing_alone() -> None:
    item = outcome("a", 1, [0.1, 0.3, np.where(np.arange(PROMPTS) == 0, np.nan, 0.4)])
    assert item.gain_at(100) == pytest.approx(np.full(PROMPTS, 0.2))
    assert np.isnan(item.gain).tolist() == [True] + [False] * (PROMPTS - 1)
    assert item.lowest_gain == pytest.approx(0.2)
    assert item.win_rate == 1.0


def runs_of(a: float, b: float, *, noise: float = 0.05, seeds: int = 3, tokens_a: int = 100) -> list[Outcome]:
    generator = np.random.default_rng(0)

    def rewards(mean: float) -> Any:
        return mean + noise * generator.standard_normal(PROMPTS)

    return [
        item
        for seed in range(1, seeds + 1)
        for item in (
            outcome("a", seed, [0.1, rewards(a)], tokens=tokens_a),
            outcome("b", seed, [0.1, rewards(b)]),
        )
    ]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [(0.5, 0.2, ["supported"] * 2), (0.0, 0.3, ["contradicted"] * 2), (0.2, 0.2, ["undecided", "supported"])],
)
def test_verdicts(tmp_path: Path, a: float, b: float, words: list[str]) -> None:
    found = verdicts(study(tmp_path), runs_of(a, b), "steps")
    assert [(each.claim, each.word) for each in found] == list(zip(("ab", "up"), words, strict=True))


def test_one_seed_gets_no_verdict(tmp_path: Path) -> None:
    found = verdicts(study(tmp_path, seeds=[1]), runs_of(0.5, 0.2, seeds=1), "steps")
    assert [each.word for each in found] == ["one seed", "one seed"]


def test_no_verdict_before_all_seeds_have_ended(tmp_path: Path) -> None:
    found = verdicts(study(tmp_path), runs_of(0.5, 0.2, seeds=2), "steps")
    assert [each.word for each in found] == ["not complete", "not complete"]


def test_equal_tokens_take_the_larger_arm_earlier(tmp_path: Path) -> None:
    """Arm a samples twice as much: at b's 100 tokens it has gained half of 0.4, as much as b."""
    runs = runs_of(0.5, 0.3, noise=0.0, tokens_a=200)
    steps, tokens = (verdicts(study(tmp_path), runs, reading)[0] for reading in ("steps", "tokens"))
    assert steps.comparison.mean == pytest.approx(0.2)
    assert tokens.comparison.mean == pytest.approx(0.0)


def test_the_page_and_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    named, outcomes = study(tmp_path), runs_of(0.5, 0.2)
    runs = [*(item.run for item in outcomes), *(PlannedRun("base", 4, arm, {}, Path("x")) for arm in "ab")]
    states: dict[str, RunState | None] = {run.name: RunState("ended", 1.0) for run in runs}
    states["base/seed-4/a"] = RunState("failed", 1.0, "error: <b>out of memory</b>")
    results = Results(runs, states, outcomes, {"base/seed-4/b": "is damaged"}, "0123abcd")
    page = write_results(named, results).read_text()
    assert "6 of 8 runs have ended, 2 without a result" in page
    assert "- base/seed-4/b: is damaged" in page
    assert "0123abcd" in page
    assert "**supported**" in page
    assert "<b>" not in page
    assert "## Held-out prompts by difficulty" in page
    assert "B|x" not in page.replace("B\\|x", "")  # it would open another column
    assert prompt_table(outcomes).num_rows == 6 * 2 * PROMPTS
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "gains.svg", "prompts.parquet", "arms.parquet", "verdicts.parquet"),
        *("quartiles.parquet", "training.parquet", "agreement.parquet"),
    }
    svg = (tmp_path / "gains.svg").read_bytes()
    write_results(named, results)
    assert (tmp_path / "gains.svg").read_bytes() == svg  # nothing of the day or the machine in it


def test_tokens_that_were_shared(tmp_path: Path) -> None:
    """Four responses that both arms have: 10 + 11 + 12 + 13 tokens, with each seed."""
    outcomes = runs_of(0.5, 0.2, seeds=2)
    assert shared_tokens(outcomes) == 2 * 46
    assert shared_tokens(outcomes[:1]) == 0
    results = Results([item.run for item in outcomes], {}, outcomes, {}, "d")
    assert (
        "have 400 tokens, of which 92 (23%) were shared"
        in write_results(study(tmp_path), results).read_text()
    )


def test_a_run_whose_iterations_were_deleted_is_named(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "support/old_run/finished", tmp_path / "run")
    run = PlannedRun("base", 1, "a", {"data": {"iterations": 3}}, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/iterations")
    with pytest.raises(UserError, match=r"iterations/000/manifest\.json is missing$"):
        read_outcome(run)


def test_a_page_that_cannot_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended() -> None:
        raise UserError("the results are in use")

    monkeypatch.setattr(runner, "_run", lambda *given: RunState("ended", 1.0, ""))
    runs = [PlannedRun("base", seed, "a", {}, tmp_path / f"run-{seed}") for seed in (1, 2)]
    assert runner.run_all(study(tmp_path), runs, ended=ended) == 0
    assert capsys.readouterr().err.count("the results are in use") == 2


def test_a_page_takes_a_share_of_the_time() -> None:
    written: list[float] = []
    write = paced(lambda: (time.sleep(0.05), written.append(time.monotonic())), share=0.1)
    write()
    write()
    assert len(written) == 1
    time.sleep(0.55)
    write()
    assert len(written) == 2


def test_a_title_is_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    named = study(tmp_path, arms={"a": Arm(title="cost $x^$"), "b": Arm()})
    outcomes = runs_of(0.5, 0.2)
    results = Results(
        [item.run for item in outcomes], {item.run.name: None for item in outcomes}, outcomes, {}, "d"
    )
    write_results(named, results)
    assert b"cost $x^$" in (tmp_path / "gains.svg").read_bytes()


def test_a_study_whose_runs_have_not_ended(tmp_path: Path) -> None:
    run = PlannedRun("base", 1, "a", {}, Path("x"))
    page = write_results(study(tmp_path), Results([run], {run.name: None}, [], {}, "d")).read_text()
    assert "0 of 1 runs have ended" in page
    assert "No claim can be read yet" in page
