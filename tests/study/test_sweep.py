"""A sweep: the study that it is, what it refuses, and the page that names the chosen value."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support.made_runs import MadeRun

from sppo_lightning.__main__ import main
from sppo_lightning.evaluation.gate import Decision, write_decisions
from sppo_lightning.study.definition import Study
from sppo_lightning.study.plan import PlannedRun, plan
from sppo_lightning.study.registration import register
from sppo_lightning.study.sweep import baseline_of, sweep_study
from sppo_lightning.types import UserError

HELD_OUT = 12


@pytest.fixture
def config(write_prompts: Callable[..., Path], tmp_path: Path) -> Path:
    """A config of ``fit`` with 40 prompts, of which a step takes 4 pairs."""
    path = tmp_path / "mine.yaml"
    content = {
        "seed_everything": 7,
        "trainer": {"default_root_dir": "runs/mine", "precision": "32-true"},
        "data": {
            **{"prompts": str(write_prompts(count=40)), "eval_prompts": "eval.jsonl", "iterations": 2},
            **{"samples_per_prompt": 4, "probe_samples": 2, "pairs_per_step": 4, "batch_size": 4},
            "selection": {"class_path": "sppo_lightning.selection.Hardest", "init_args": {"fraction": 0.4}},
            "generator": {"class_path": "sppo_lightning.generation.HFGenerator"},
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def changed(config: Path, **changes: Any) -> None:
    content = yaml.safe_load(config.read_text())
    content["data"].update(changes)
    config.write_text(yaml.safe_dump(content))


def arguments(config: Path, *more: str) -> list[str]:
    return [
        "study",
        "--sweep",
        "fraction",
        "--config",
        str(config),
        "--output",
        str(config.parent / "out"),
        *more,
    ]


def ended(study: Study, run: PlannedRun, gain: float, *, reverted: bool = False) -> None:
    """Leave a run as one that has ended, whose final held-out rewards are higher by ``gain`` than other runs'."""
    made = MadeRun(run.folder, held_out=HELD_OUT).write()
    replace(made, lift=gain).evaluate(2)
    if reverted:
        taken_back = Decision(1, "revert", ("lower",), 0, -0.1, 0.01, 1.0, "a policy")
        write_decisions(made.folder, [taken_back, Decision(2, "accept", (), 2, 0.1, 0.01, 1.0, "a policy")])
    state = study.folder / "state" / f"{run.name}.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"status": "ended", "seconds": 1.0}))


def planned(config: Path, **given: str) -> tuple[Study, list[PlannedRun]]:
    study = sweep_study(config, "fraction", output=str(config.parent / "out"), **given)
    return study, plan(study, config)


def test_a_value_is_an_arm(config: Path) -> None:
    study, runs = planned(config, values="1,0.125, 0.3", seeds="4,2")
    assert {arm: study.title(arm) for arm in study.arms} == {
        **{"fraction-0.125": "easiest 12.5 %", "fraction-0.3": "easiest 30 %", "fraction-1.0": "all prompts"}
    }
    assert [run.name for run in runs][:3] == [f"values/seed-2/{arm}" for arm in study.arms]
    assert [run.config["data"]["selection"] for run in runs[-2:]] == [
        {"class_path": "sppo_lightning.selection.Easiest", "init_args": {"fraction": 0.3}},
        {"class_path": "sppo_lightning.selection.All"},
    ]
    assert runs[-1].config["seed_everything"] == 4
    assert runs[-1].config["trainer"]["precision"] == "32-true"
    assert baseline_of(study, "fraction") == "fraction-1.0"
    assert baseline_of(planned(config, values="0.1,0.3")[0], "fraction") is None


def test_without_more_words(config: Path) -> None:
    study = sweep_study(config, "fraction")
    assert study.folder == Path("runs/studies/fraction-mine")
    assert study.seeds == [1, 2, 3]
    assert [arm.rpartition("-")[2] for arm in study.arms] == ["0.1", "0.3", "0.5", "1.0"]


def test_each_value_trains_as_the_config_does(config: Path) -> None:
    """With steps of its own all values take them; without, an epoch over the pairs that a value leaves."""
    study = sweep_study(config, "fraction")
    assert study.matched == "nothing"
    assert any("To compare at equal steps" in limit for limit in study.limits)
    changed(config, steps_per_iteration=3)
    study = sweep_study(config, "fraction")
    assert study.matched == "steps"
    assert not any("To compare at equal steps" in limit for limit in study.limits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sweep": "rate"}, "--sweep rate: there is no such sweep; give fraction"),
        ({"values": "0.5"}, "--values 0.5: one value leaves nothing to choose"),
        ({"values": "0,0.5"}, "--values 0,0.5: 0.0 lies outside (0, 1]"),
        ({"values": "0.5,1.1"}, "1.1 lies outside (0, 1]"),
        ({"values": "nan,0.5"}, "nan lies outside (0, 1]"),
        ({"values": "0.3,0.30"}, "--values 0.3,0.30: 0.3 is there twice"),
        (
            {"values": "0.3,x"},
            "--values 0.3,x: 'x' is no such number: give some, separated by commas, e.g. 0.1",
        ),
        ({"values": ""}, "'' is no such number"),
        ({"seeds": "1,1"}, "--seeds 1,1: 1 is there twice"),
        ({"seeds": "1.5"}, "--seeds 1.5: '1.5' is no such number"),
        ({"seeds": "-1"}, "--seeds -1: -1 must be a number from 0 to 4294967295"),
    ],
)
def test_what_is_refused(config: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        sweep_study(config, **{"sweep": "fraction", **given})  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_without_held_out_prompts(config: Path) -> None:
    changed(config, eval_prompts=None)
    with pytest.raises(UserError, match=r"mine.yaml: has no data.eval_prompts"):
        sweep_study(config, "fraction")
    config.write_text("name: a study\n")
    with pytest.raises(UserError, match=r"mine.yaml: has no data.eval_prompts"):
        sweep_study(config, "fraction")


def failing(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    with pytest.raises(SystemExit):
        main(given)
    return capsys.readouterr().err


def test_the_command_refuses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "arm fraction-0.05 in setting values: data.selection keeps 2 of 40" in failing(
        capsys, arguments(config, "--values", "0.05,0.5")
    )
    assert "one value leaves nothing to choose" in failing(capsys, arguments(config, "--values", "0.5"))
    given = ["study", "--config", str(config), "--values", "0.1,0.5"]
    assert "--values, --seeds and --output belong to --sweep" in failing(capsys, given)
    assert not (config.parent / "out/study.json").exists()


def test_the_page_names_the_chosen_value(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(config, steps_per_iteration=3)
    study, runs = planned(config, values="0.1,0.3,1.0", seeds="1,2")
    given = arguments(config, "--values", "0.1,0.3,1.0", "--seeds", "1,2")
    for run in runs:
        share = float(run.arm.rpartition("-")[2])
        ended(study, run, {0.1: -0.1, 0.3: 0.2, 1.0: 0.0}[share] + 0.001 * run.seed * share)
    main(given)
    page = (study.folder / "README.md").read_text()
    assert page.startswith("# fraction-mine\n\nWhich fraction of the prompts")
    assert "**easiest 30 %** has the highest mean gain. It gains more than each of the others" in page
    assert "fraction: 0.3\n```" in page
    assert "| the same, less that of all prompts | +0.199 [" in page
    assert "Choosing so is better than the initial policy." in page
    assert "Choosing so is better than training on all prompts." in page
    assert "It fell on: easiest 10 % (0%), easiest 30 % (100%), all prompts (0%)." in page
    assert page.index("## Choice") < page.index("| arm | seeds |") < page.index("## What this cannot say")
    assert "IterationGate" not in page

    values = pq.read_table(study.folder / "values.parquet").to_pylist()
    assert [row["arm"] for row in values if row["chosen"]] == ["fraction-0.3"]
    assert sum(row["share_of_choices"] for row in values) == pytest.approx(1)
    estimates = pq.read_table(study.folder / "estimates.parquet").to_pylist()
    assert [row["of"] for row in estimates] == [
        *("chosen, uncorrected", "choosing", "choosing, less fraction-1.0")
    ]
    assert estimates[0]["low"] is None
    assert estimates[2]["low"] > 0
    capsys.readouterr()

    main([*given, "--action", "status"])
    assert "6 of 6 runs have ended" in capsys.readouterr().out
    assert "whose arms, seeds was named otherwise" in failing(
        capsys, arguments(config, "--values", "0.1,0.3")
    )
    changed(config, batch_size=2)
    assert "whose config of values/seed-1/fraction-0.1 was named otherwise" in failing(capsys, given)


def test_values_that_tie(config: Path) -> None:
    study, runs = planned(config, values="0.3,0.5", seeds="1,2")
    for run in runs:
        ended(
            study, run, 0.1 if (run.arm == "fraction-0.3") == (run.seed == 1) else 0.0, reverted=run.seed == 1
        )
    main(arguments(config, "--values", "0.3,0.5", "--seeds", "1,2"))
    page = (study.folder / "README.md").read_text()
    assert (
        "may be as good (paired by seed and prompt, at 95%, corrected for the number of values): easiest 50 %"
        in page
    )
    assert "the same, less that of" not in page  # without 1.0 there is nothing to compare with
    assert "decided by the same held-out prompts" in page


def test_one_seed_is_measured_on_other_prompts_alone(config: Path) -> None:
    study, runs = planned(config, values="0.3,1.0", seeds="1")
    for run in runs:
        ended(study, run, 0.1 if run.arm == "fraction-0.3" else 0.0)
    main(arguments(config, "--values", "0.3,1.0", "--seeds", "1"))
    page = (study.folder / "README.md").read_text()
    assert "with the one seed" in page
    assert "Chosen and measured with one seed" in page
    assert "| the same, less that of all prompts | +0.100 |" in page
    assert "Choosing so is" not in page


def test_nothing_is_chosen_before_all_have_ended_and_a_failed_value_is_not_chosen_from(config: Path) -> None:
    study, runs = planned(config, values="0.1,0.3,1.0", seeds="1,2")
    for run in runs:
        if run.arm != "fraction-0.1":
            ended(study, run, 0.1 if run.arm == "fraction-0.3" else 0.0)
    register(study, runs, {})
    given = arguments(config, "--action", "tables", "--values", "0.1,0.3,1.0", "--seeds", "1,2")
    main(given)
    assert "No value is chosen before all runs have ended." in (study.folder / "README.md").read_text()
    for seed in (1, 2):
        state = study.folder / f"state/values/seed-{seed}/fraction-0.1.json"
        state.write_text(json.dumps({"status": "failed", "seconds": 1.0, "message": "too few pairs"}))
    main(given)
    page = (study.folder / "README.md").read_text()
    assert "**easiest 30 %** has the highest mean gain" in page
    assert "- easiest 10 %: not chosen from, as a run has no result." in page
