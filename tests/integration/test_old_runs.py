"""Run folders that commit a42d472 wrote (see support/old_run/record.py): resumed and read by the present code.

The folders may have been written on another processor, whose products round differently. So what is compared are
decisions (names of files, prompt ids, token ids, finish reasons, which prompts were selected, counts), to the letter;
rewards, log-probs and metrics to :data:`TOLERANCE`; times and weights not at all.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from sppo_lightning.__main__ import main

RECORDED = Path(__file__).parents[1] / "support" / "old_run"
LAST = "checkpoints/last.ckpt"
TOLERANCE = 1e-3  # of rewards (about 1), log-probs of a response (about 30 nats) and metrics
UNLIKE = ("time/", "memory/")  # metrics of the machine


def copied(folder: Path) -> Path:
    shutil.copytree(RECORDED, folder, dirs_exist_ok=True)
    return folder


def command(name: str, run: str, *more: str) -> None:
    main([name, "--config=config.yaml", f"--trainer.default_root_dir={run}", *more])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed run, brought to its end."""
    folder = copied(tmp_path_factory.mktemp("resumed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("fit", "killed")
    return folder / "killed"


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, in the working directory."""
    monkeypatch.chdir(copied(tmp_path))
    return tmp_path / "finished"


def content(run: Path, pattern: str) -> dict[str, Any]:
    """Return what the files of a run hold that match ``pattern``, of which there must be some."""
    read = {".parquet": lambda path: pq.read_table(path, partitioning=None).to_pylist(), ".json": read_json}
    paths = sorted(run.glob(pattern))
    assert paths
    return {str(path.relative_to(run)): read[path.suffix](path) for path in paths}


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def approximately(value: Any) -> Any:
    """Return what compares equal to a value whose floats differ by rounding."""
    if isinstance(value, float):
        return pytest.approx(value, abs=TOLERANCE, nan_ok=True)
    if isinstance(value, list | tuple):
        return type(value)(map(approximately, value))
    if isinstance(value, dict):
        return {name: approximately(item) for name, item in value.items()}
    return value


def as_recorded(value: Any, recorded: Any) -> Any:
    """Return a value without the keys that later versions have added."""
    if isinstance(recorded, dict):
        return {key: as_recorded(value[key], recorded[key]) for key in recorded}
    if isinstance(recorded, list):
        return [as_recorded(*items) for items in zip(value, recorded, strict=True)]
    return value


def test_a_killed_run_ends_as_the_one_that_was_not(resumed: Path) -> None:
    expected = RECORDED / "finished"
    names = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        for run in (expected, resumed)
    ]
    assert {name for name in names[0] if not name.startswith("evaluations/test-")} <= names[1]
    for pattern in ("iterations/*/rollouts/*.parquet", "iterations/*/*.parquet", "evaluations/00?/*.parquet"):
        assert as_recorded(content(resumed, pattern), content(expected, pattern)) == approximately(
            content(expected, pattern)
        )


def comparable(values: Any) -> Any:
    """Leave out the mean rewards and parts of an iteration, which are taken over other samples now."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not name.startswith("iteration/reward/")}


def test_its_manifests_count_the_same(resumed: Path) -> None:
    kept = ("iteration", "complete", "counts", "dropped", "responses", "seed", "metrics")
    found, expected = (
        {
            name: {key: comparable(manifest[key]) for key in kept}
            for name, manifest in content(run, "iterations/*/manifest.json").items()
        }
        for run in (resumed, RECORDED / "finished")
    )
    assert as_recorded(found, expected) == approximately(expected)


def test_its_metrics_have_neither_gaps_nor_repeats(resumed: Path) -> None:
    with (RECORDED / "finished/metrics.csv").open(newline="") as file:
        known = set(next(csv.reader(file)))

    def rows(run: Path) -> list[dict[str, Any]]:
        with (run / "metrics.csv").open(newline="") as file:
            rows = [
                {name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)
            ]
        named = [
            comparable({k: v for k, v in row.items() if k in known and not k.startswith(UNLIKE)})
            for row in rows
        ]
        return [row for row in named if row.keys() != {"step"}]

    found, expected = rows(resumed), rows(RECORDED / "finished")
    assert len(found) == len(expected)
    for row, recorded in zip(found, expected, strict=True):
        assert {name: row.get(name) for name in recorded} == approximately(
            recorded
        )  # later versions say more


@pytest.mark.parametrize(("name", "evaluation"), [("validate", "003"), ("test", "test-003")])
def test_a_finished_run_is_measured_on_the_answers_that_it_has(
    finished: Path, capsys: pytest.CaptureFixture[str], name: str, evaluation: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("evaluations/*/rollouts.parquet")}
    assert finished / "evaluations" / evaluation / "rollouts.parquet" in before
    command(name, "finished", f"--ckpt_path=finished/{LAST}")
    assert "/win_rate" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_than_those_of_the_answers_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "--data.reward.init_args.weights={model: 1.0, errors: 0.2}"
    with pytest.raises(SystemExit):
        command("validate", "finished", f"--ckpt_path=finished/{LAST}", change)
    assert (
        "holds answers to other prompts, or from another data.generator or data.reward"
        in capsys.readouterr().err
    )


def test_a_finished_run_answers_and_is_exported(finished: Path) -> None:
    command("predict", "finished", f"--ckpt_path=finished/{LAST}")
    lines = (finished / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["predict0", "predict1"]
    main(["export", "finished", "--format=hf", "--output=exported"])
    exported, trained = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in ("exported", "finished/policy")
    )
    assert all(weight.equal(trained[name]) for name, weight in exported.items())
