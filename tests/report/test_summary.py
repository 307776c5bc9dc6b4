"""The summary in JSON types and in Markdown, and several runs against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.made_runs import MadeRun

from sppo_lightning.evaluation.length_controlled import length_controlled_win_rate
from sppo_lightning.report.comparison import check_comparable
from sppo_lightning.report.estimates import INTERVAL
from sppo_lightning.report.held_out import REFITS, length_controlled
from sppo_lightning.report.markdown import markdown
from sppo_lightning.report.run_data import read_run
from sppo_lightning.report.settings import flat_settings
from sppo_lightning.report.summary import POINTS, summary, thinned
from sppo_lightning.system.durable import with_checksum
from sppo_lightning.types import Rollout, UserError


def test_held_out_numbers(tmp_path: Path) -> None:
    """Rewards 0, 0.1, 0.2, 0.3; after one iteration 0.2 + 0.15 k: gains 0.2, 0.25, 0.3, 0.35."""
    found = summary([read_run(MadeRun(tmp_path / "run").write().root)])
    initial, first, _ = found["runs"][0]["held_out"]
    assert initial["measures"]["reward"] == pytest.approx(
        {"mean": 0.15, "stderr": math.sqrt(0.05 / 3) / 2, "size": 4}
    )
    assert "gain" not in initial["measures"]
    assert first["measures"]["gain"]["mean"] == pytest.approx(0.275)
    assert first["measures"]["win_rate"] == {"mean": 1.0, "stderr": 0.0, "size": 4}
    assert first["measures"]["length"]["mean"] == 9.0


def test_kl_has_an_interval_over_prompts_where_each_one_is_stored(tmp_path: Path) -> None:
    """0.05 times 0.9, 1, 1.1 and 1.2; older runs have the mean of all alone, 0.05."""
    made = MadeRun(tmp_path / "run").write()
    initial, first, _ = summary([read_run(made.root)])["runs"][0]["held_out"]
    assert "kl" not in initial["measures"]
    expected = {"mean": 0.0525, "stderr": 0.005 * math.sqrt(5 / 3) / 2, "size": 4}
    assert first["measures"]["kl"] == pytest.approx(expected)
    logps = with_checksum({"logps": {"e0": -3.0}})
    (made.folder.evaluation("001") / "logps.json").write_bytes(logps)
    first = summary([read_run(made.root)])["runs"][0]["held_out"][1]
    assert first["measures"]["kl"] == {"mean": 0.05, "stderr": None, "size": 1}


def test_the_length_controlled_win_rate_is_that_of_the_judge(tmp_path: Path) -> None:
    """Eight prompts, all won by longer answers: nothing but length tells them apart, and it says so of all."""
    pytest.importorskip("sklearn")
    found = summary([read_run(MadeRun(tmp_path / "run", held_out=8).write().root)])
    initial, first, _ = found["runs"][0]["held_out"]
    assert "length_controlled_win_rate" not in initial["measures"]
    assert first["measures"]["length_controlled_win_rate"] == {"mean": 1.0, "stderr": 0.0, "size": 8}
    rows = [Rollout(f"e{n}", 0, "p", "a" * (5 + n % 3), (1,), "stop", float(n % 4 < 2)) for n in range(40)]
    before = [Rollout(f"e{n}", 0, "p", "b" * (3 + n % 5), (1,), "stop", 0.5) for n in range(40)]
    expected = length_controlled_win_rate(
        [float((row.reward or 0) > 0.5) for row in rows],
        [len(row.response) for row in rows],
        [len(row.response) for row in before],
        seed=0,
        resamples=REFITS,
    )
    shown = length_controlled(rows, before)
    assert (shown.mean, shown.size) == (expected.rate, 40)
    assert 2 * INTERVAL * shown.stderr == pytest.approx(expected.high - expected.low)


def test_phases_have_times_and_tokens(tmp_path: Path) -> None:
    """Iteration 0 answers the held-out prompts twice: 4 x 10 tokens before it, 4 x 9 after."""
    (run,) = summary([read_run(MadeRun(tmp_path / "run").write().root)])["runs"]
    phases = {(one["iteration"], one["phase"]): (one["seconds"], one["tokens"]) for one in run["phases"]}
    assert phases[0, "probing"] == (2.0, 132)
    assert phases[0, "evaluating"] == (None, 76)
    assert phases[1, "evaluating"] == (None, 32)
    assert phases[1, "training"] == (5.0, 45)
    assert run["iteration_steps"] == {"0": 0, "1": 5}


@pytest.mark.parametrize(
    ("length", "tokens"), [({"epochs_per_iteration": 2}, 90), ({"steps_per_iteration": 6}, 180)]
)
def test_pairs_that_are_passed_over_again_are_counted_again(
    length: dict[str, int], tokens: int, tmp_path: Path
) -> None:
    """Three pairs of 45 tokens in all, two in a step."""
    config = {"data": {"iterations": 2, "pairs_per_step": 2, **length}}
    (run,) = summary([read_run(MadeRun(tmp_path / "run", config=config).write().root)])["runs"]
    assert {one["tokens"] for one in run["phases"] if one["phase"] == "training"} == {tokens}


def test_a_summary_is_json_without_nan(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", held_out=1).write()  # one prompt has no standard error
    found = summary([read_run(made.root)])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["runs"][0]["held_out"][0]["measures"]["reward"]["stderr"] is None


def test_no_folder_of_the_machine_is_named(tmp_path: Path) -> None:
    found = summary([read_run(MadeRun(tmp_path / "run").write().root)])
    assert str(tmp_path) not in json.dumps(found)
    settings = found["runs"][0]["settings"]
    assert settings["trainer.default_root_dir"] == "…/run"
    assert settings["model.policy.pretrained"] == "…/tiny"


def test_settings_are_flat() -> None:
    config = {"a": {"b": [1, 2]}, "c": [{"d": "x"}, None], "e": {}, "f": "owner/name"}
    assert flat_settings(config) == {"a.b": "1, 2", "c[0].d": "x", "c[1]": None, "e": "{}", "f": "owner/name"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/my data/x.jsonl", "…/x.jsonl"),
        ("/data", "…/data"),
        ("~/x", "…/x"),
        (r"C:\Users\me\x.jsonl", "…/x.jsonl"),
        (r"\\server\me\x.jsonl", "…/x.jsonl"),
        ("sqlite:////home/me/x.db", "sqlite:…/x.db"),
        ("file:///home/me/d", "file:…/d"),
        ("file://localhost/home/me/d", "file:…/d"),
        ("python /home/me/x.py --in=/home/me/y", "python …/x.py --in=…/y"),
        ("first\n/home/me/x\nlast /home/me/y", "first\n…/x\nlast …/y"),
        ("['/home/me/x', \"/home/me/y\"]", "['…/x', \"…/y\"]"),
        ("[/home/me/x]", "[…/x]"),
        *(
            (same, same)
            for same in (
                "owner/name",
                "data/train.jsonl",
                "./x",
                "https://host:8000/v1/score",
                "s3://bucket/x",
                "[INST] {q} [/INST] </s>",
                "and/or 1 / 2",
            )
        ),
    ],
)
def test_absolute_paths_inside_of_settings(value: str, shown: str) -> None:
    assert flat_settings({"key": value}) == {"key": shown}


def test_long_curves_are_averaged() -> None:
    steps, values = thinned((list(range(10_000)), [float(step) for step in range(10_000)]))
    assert len(steps) == POINTS
    assert values == sorted(values)
    assert values[0] == pytest.approx(7.5)  # of 16 values
    assert thinned(([2, 1], [5.0, math.nan])) == ([2], [5.0])


def test_runs_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    one = MadeRun(tmp_path / "one").write()
    other = MadeRun(tmp_path / "other", lift=0.5, config={"seed_everything": 4}).write()
    runs = [read_run(made.root) for made in (one, other)]
    check_comparable(runs)
    comparison = summary(runs)["comparison"]
    assert comparison["settings"] == {"seed_everything": [3, 4]}
    assert [item["finished"] for item in comparison["differences"]] == [1, 2]
    for item in comparison["differences"]:
        assert item["reward"]["mean"] == pytest.approx(0.5)
        assert item["reward"]["stderr"] == pytest.approx(0.0, abs=1e-9)
        assert item["win_rate"]["mean"] == 1.0


def test_comparisons_with_other_initial_answers_are_not_compared(tmp_path: Path) -> None:
    judge = {"class_path": "sppo_lightning.rewards.PairwiseReward", "init_args": {}}
    config = {"data": {"iterations": 2, "reward": {"class_path": "x.Mine", "init_args": {"of": [judge]}}}}
    one, same = (MadeRun(tmp_path / name, config=config).write() for name in ("one", "same"))
    other = MadeRun(tmp_path / "other", config=config, response=lambda *_: "else").write()
    found = summary([read_run(made.root) for made in (one, same, other)])
    assert {item["run"] for item in found["comparison"]["differences"]} == {1}
    assert found["runs"][1]["missing"] == []
    assert found["runs"][2]["missing"] == [
        "evaluations: rewards are comparisons with the run's own initial policy, which answered unlike that of one. "
        "Differences from it are not shown."
    ]


def test_other_held_out_prompts_are_refused(tmp_path: Path) -> None:
    runs = [
        read_run(MadeRun(tmp_path / f"run{held_out}", held_out=held_out).write().root) for held_out in (4, 3)
    ]
    with pytest.raises(
        UserError, match=r"the runs run4 and run3 have different held-out prompts \(4 and 3, 3 of"
    ):
        check_comparable(runs)


def test_markdown(tmp_path: Path) -> None:
    runs = [
        read_run(MadeRun(tmp_path / name, lift=lift).write().root)
        for name, lift in (("one", 0.0), ("two", 0.5))
    ]
    text = markdown(summary(runs))
    assert (
        "| after 1 iteration(s) | 0.425 ± 0.190 | +0.275 ± 0.063 | 100.0% ± 0.0% | 0.053 ± 0.006 | 9.0 ± 0.0 |"
        in text
    )
    assert "| 0 | 0.500 | 0.250 / 0.500 / 0.750 | 3 | 6 not_selected, 3 tied_rewards | 8 |" in text
    assert "| 2 iteration(s) | accept | after 2 iteration(s) | 1 |  |" in text
    assert "| two | 1 iteration(s) | +0.500 ± 0.000 | 100.0% ± 0.0% | +0.0 ± 0.0 |" in text


def test_markdown_of_hostile_names(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "<img src=x>|`run`").write()
    text = markdown(summary([read_run(made.root)]))
    assert text.startswith("# &lt;img src=x>\\|\\`run\\`\n")
