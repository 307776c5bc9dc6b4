"""Study files: what they hold, and what is refused before anything runs."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppo_lightning.study.command import study as study_command
from sppo_lightning.study.definition import read_study
from sppo_lightning.study.plan import merged, of_arms, of_job, pinned_settings, plan
from sppo_lightning.study.registration import check_registered, read_registration, register
from sppo_lightning.types import UserError

GENERATOR = {"class_path": "sppo_lightning.generation.HFGenerator", "init_args": {"max_new_tokens": 8}}
BASE: dict[str, Any] = {
    "data": {
        "eval_prompts": "eval.jsonl",
        "iterations": 2,
        "steps_per_iteration": 3,
        "pairs_per_step": 4,
        "generator": GENERATOR,
    }
}
STUDY: dict[str, Any] = {
    "name": "small",
    "question": "Which?",
    "config": ["base.yaml"],
    "seeds": [1, 2],
    "arms": {"a": {}, "b": {"config": {"model": {"learning_rate": 1.0}}, "title": "B"}},
    "claims": {"first": {"text": "A beats B.", "arm": "a", "against": "b"}},
}


def written(folder: Path, base: dict[str, Any] = BASE, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, "output": str(folder / "out"), **changes}))
    return folder / "study.yaml"


def test_a_study_is_its_arms_seeds_and_settings(tmp_path: Path) -> None:
    path = written(tmp_path, settings={"one": {}, "two": {"data": {"iterations": 5}}})
    runs = plan(read_study(path), path)
    assert [run.name for run in runs] == [
        f"{setting}/seed-{seed}/{arm}" for setting in ("one", "two") for seed in (1, 2) for arm in "ab"
    ]
    config = runs[-1].config
    assert (config["seed_everything"], config["data"]["iterations"]) == (2, 5)
    assert config["model"] == {"learning_rate": 1.0}
    assert config["trainer"]["default_root_dir"] == str(tmp_path / "out/runs/two/seed-2/b")
    assert config["data"]["generator"]["init_args"] == {
        "generator": GENERATOR,
        "folder": str(tmp_path / "out/responses/two"),
    }


def test_an_arm_has_seeds_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, arms={"a": {"seeds": [1, 2, 3]}, "b": {}})
    names = [run.name for run in plan(read_study(path), path)]
    assert names == ["base/seed-1/a", "base/seed-1/b", "base/seed-2/a", "base/seed-2/b", "base/seed-3/a"]


def test_jobs_share_a_study_out(tmp_path: Path) -> None:
    path = written(tmp_path, seeds=[1, 2, 3, 4, 5])
    runs = plan(read_study(path), path)
    shares = [of_job(runs, job, 3) for job in (1, 2, 3)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in runs)
    seeds = [{run.seed for run in share} for share in shares]
    assert not seeds[0] & seeds[1] | seeds[1] & seeds[2] | seeds[0] & seeds[2]


def test_some_arms_run_alone_and_in_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, arms={"a": {}, "b": {}, "c": {"seeds": [2]}}, seeds=[1, 2, 3])
    runs = plan(read_study(path), path)
    names = [run.name for run in of_arms(runs, ["c", "a"])]
    assert names == ["base/seed-1/a", "base/seed-2/c", "base/seed-2/a", "base/seed-3/a"]
    assert [run.name for run in of_arms(of_job(runs, 2, 2), ["c", "a"])] == ["base/seed-2/c", "base/seed-2/a"]


def test_an_arm_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=r"^--arms b,z: there is no arm 'z'; there are a, b$"):
        study_command(str(path), arms="b,z")
    assert not (tmp_path / "out/study.json").exists()


def test_a_class_takes_its_arguments_with_it() -> None:
    below = {"loss": {"class_path": "x.A", "init_args": {"beta": 1}}, "rate": 1}
    other = {"loss": {"class_path": "x.B", "init_args": {"tau": 2}}}
    assert merged(below, other) == {**other, "rate": 1}
    assert merged(below, {"loss": {"init_args": {"beta": 3}}})["loss"] == {
        "class_path": "x.A",
        "init_args": {"beta": 3},
    }
    assert below["loss"]["init_args"] == {"beta": 1}


def registered(path: Path) -> str:
    study = read_study(path)
    return register(study, plan(study, path), {}).digest


def test_what_is_named_before_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path)
    study, digest = read_study(path), registered(path)
    before = read_registration(study)
    assert before is not None
    assert before.digest == digest
    check_registered(study, plan(study, path), before)

    moved = written(tmp_path, output=str(tmp_path / "elsewhere"))
    check_registered(read_study(moved), plan(read_study(moved), moved), before)
    for changes, what in [
        ({"seeds": [1, 3]}, "seeds"),
        ({"claims": {}}, "claims"),
        ({"arms": {"a": {}, "b": {}}}, "arms"),
    ]:
        path = written(tmp_path, **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"whose {what}.* was named otherwise before it ran"):
            check_registered(read_study(path), plan(read_study(path), path), before)
    path = written(tmp_path, base={"data": {**BASE["data"], "batch_size": 2}})
    with pytest.raises(UserError, match="whose config of base/seed-1/a was named otherwise"):
        check_registered(read_study(path), plan(read_study(path), path), before)


def test_the_day_and_the_machine_decide_nothing_after_the_start(tmp_path: Path) -> None:
    path = written(tmp_path)
    study = read_study(path)
    pinned = pinned_settings(study, path)
    assert set(pinned["trainer"]) == {"precision"}
    config = plan(study, path, {**pinned, "trainer": {"precision": "16-mixed"}})[0].config
    assert config["trainer"]["precision"] == "16-mixed"
    assert config["model"]["policy"]["template_date"] == date.today().isoformat()
    own = written(tmp_path, base={**BASE, "trainer": {"precision": "64-true"}})
    assert plan(study, own, pinned)[0].config["trainer"]["precision"] == "64-true"


def test_short_forms_of_classes(tmp_path: Path) -> None:
    below = {"loss": {"class_path": "sppo_lightning.losses.DPOLoss", "init_args": {"beta": 1}}}
    assert merged(below, {"loss": {"class_path": "DPOLoss", "init_args": {"x": 2}}})["loss"]["init_args"] == {
        **{"beta": 1, "x": 2}
    }
    assert merged({"loss": "DPOLoss"}, {"loss": {"init_args": {"x": 2}}})["loss"] == {
        **{"class_path": "DPOLoss", "init_args": {"x": 2}}
    }
    path = written(tmp_path, base={"data": {**BASE["data"], "generator": "HFGenerator"}})
    generator = plan(read_study(path), path)[0].config["data"]["generator"]
    assert generator["init_args"]["generator"] == {"class_path": "HFGenerator"}
    already = {"class_path": "CachedGenerator", "init_args": {"generator": "HFGenerator", "folder": "x"}}
    path = written(tmp_path, base={"data": {**BASE["data"], "generator": already}})
    assert plan(read_study(path), path)[0].config["data"]["generator"] == already


def test_the_output_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert read_study(written(tmp_path, output="$PLACE/out")).folder == tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds is empty: name at least one"),
        ({"arms": {}}, "arms is empty: name at least one"),
        ({"config": ["other.yaml"]}, "config: other.yaml is not there"),
        ({"arms": {"../a": {}}}, "becomes a folder's name"),
        ({"arms": {"initial": {}}}, "'initial' stands for the policy that all arms start from"),
        ({"arms": {"a": {"config": 3}}}, "arms.a.config is 3: name settings below it"),
        ({"settings": {"one": "x"}}, "settings.one is 'x': name settings below it"),
        ({"seeds": [1, 1]}, "arms.a: its seeds [1, 1] repeat one"),
        ({"seeds": ["x"]}, "seeds"),
        ({"matched": "pairs"}, "matched"),
        ({"claims": {"c": {"text": "t", "arm": "z", "against": "a"}}}, "there is no arm 'z'; there are a, b"),
        (
            {"claims": {"c": {"text": "t", "arm": "a", "against": "b", "settings": ["z"]}}},
            "there is no setting 'z'",
        ),
        ({"arms": {"a": {"seeds": [3]}, "b": {}}}, "a and b have no seed in common"),
        ({"extra": 1}, "extra"),
        ({"arms": {"a": {"seeds": []}, "b": {}}}, "arms.a: seeds is empty"),
        ({"arms": {1: {}}}, "1"),
        ({"settings": {"one": {"seed_everything": 3}}}, "which the study sets for each run"),
        (
            {"arms": {"a": {"config": {"trainer": {"default_root_dir": "x"}}}}},
            "which the study sets for each run",
        ),
        ({"arms": {"a": {"config": {"x": {"api_key": "sk-123"}}}}}, "holds a secret"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_study(written(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "holds no settings"), ("a: [", "is no YAML"), ("name: x", "question")]
)
def test_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"data": {"eval_prompts": "other.jsonl"}}, "arms a and b have different held-out prompts"),
        ({"data": {"eval_prompts": None}}, "arm b in setting base has no data.eval_prompts"),
        ({"data": {"steps_per_iteration": 4}}, "arms a and b have different optimizer steps"),
        ({"data": {"pairs_per_step": 8}}, "arms a and b have different optimizer steps"),
        ({"data": {"steps_per_iteration": None}}, "has no data.steps_per_iteration"),
        ({"model": {"policy": {"quantization": "nf4"}}}, "different policies to start from"),
        ({"data": {"generator": {"init_args": {"max_new_tokens": 9}}}}, "different lengths of answers"),
        ({"data": {"keep_iterations": 1}}, "sets data.keep_iterations: leave it out"),
        ({"data": {"resume": "never"}}, "sets data.resume: leave it out"),
    ],
)
def test_arms_that_cannot_be_compared(tmp_path: Path, arm: dict[str, Any], message: str) -> None:
    path = written(tmp_path, arms={"a": {}, "b": {"config": arm}})
    with pytest.raises(UserError, match=message):
        plan(read_study(path), path)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is no YAML"), ("- 1", "holds no settings"), ("data:", "no data.iter")]
)
def test_a_base_config_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path)
    (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        plan(read_study(path), path)


def test_steps_may_differ_where_the_study_says_so(tmp_path: Path) -> None:
    arms = {"a": {}, "b": {"config": {"data": {"steps_per_iteration": None}}}}
    path = written(tmp_path, arms=arms, matched="nothing")
    assert len(plan(read_study(path), path)) == 4
