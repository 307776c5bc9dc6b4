"""``validate``, ``test`` and ``predict`` of a trained policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.runs import cli_arguments

from sppo_lightning.__main__ import main

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arguments]:
    """A finished run, and a builder of the arguments that it was made with."""
    folder = tmp_path_factory.mktemp("trained")
    for name, start in (("train", 0), ("eval", 50), ("test", 80)):
        lines = [f'{{"id": "{name}{n}", "prompt": "Count to {start + n}"}}\n' for n in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(lines))

    def build(**changes: Any) -> list[str]:
        changes = {"data__eval_prompts": folder / "eval.jsonl", "data__iterations": 1, **changes}
        return cli_arguments(tiny_policy, folder / "train.jsonl", folder / "run", **changes)

    main(["fit", *build()])
    return folder, build


def answers(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path, partitioning=None).to_pylist()


def test_validate_measures_the_checkpoint(
    trained: tuple[Path, Arguments], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, build = trained
    stored = folder / "run/evaluations/001/rollouts.parquet"
    before = stored.stat().st_mtime_ns
    main(["validate", *build(), f"--ckpt_path={folder}/run/checkpoints/last.ckpt"])
    shown = capsys.readouterr().out
    assert "val/reward/mean" in shown
    assert "val/win_rate" in shown
    assert stored.stat().st_mtime_ns == before, "answers of the same policy are not made again"


def test_test_compares_with_the_initial_policy(
    trained: tuple[Path, Arguments], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, build = trained
    last = f"--ckpt_path={folder}/run/checkpoints/last.ckpt"
    main(["test", *build(data__test_prompts=folder / "test.jsonl"), last])
    assert "test/win_rate" in capsys.readouterr().out
    initial = answers(folder / "run/evaluations/test-000/rollouts.parquet")
    final = answers(folder / "run/evaluations/test-001/rollouts.parquet")
    assert [row["prompt_id"] for row in initial] == [f"test{n}" for n in range(12)]
    assert [row["token_ids"] for row in initial] != [row["token_ids"] for row in final]


def test_predict_writes_answers(trained: tuple[Path, Arguments]) -> None:
    folder, build = trained
    last = f"--ckpt_path={folder}/run/checkpoints/last.ckpt"
    main(["predict", *build(data__predict_prompts=folder / "eval.jsonl"), last])
    lines = (folder / "run/predictions.jsonl").read_text().splitlines()
    stored = answers(folder / "run/evaluations/001/rollouts.parquet")
    found = [json.loads(line) for line in lines]
    assert [row["response"] for row in found] == [row["response"] for row in stored]
    assert [row["id"] for row in found] == [f"eval{n}" for n in range(12)]


def test_predict_asks_second_turns(
    trained: tuple[Path, Arguments], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, build = trained
    last = f"--ckpt_path={folder}/run/checkpoints/last.ckpt"
    questions = [
        {"question_id": 81 + n, "category": "math", "turns": [f"Count to {50 + n}", f"Now to {n}"]}
        for n in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    main(
        [
            *("predict", *build(data__predict_prompts=folder / "questions.jsonl"), last),
            *("--format", "mt_bench", "--format.model", "mine"),
        ]
    )
    lines = (folder / "run/predictions-mt_bench.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in found] == [81, 82, 83]
    assert {row["model_id"] for row in found} == {"mine"}
    stored = answers(folder / "run/evaluations/001/rollouts.parquet")
    turns = [row["choices"][0]["turns"] for row in found]
    assert [first for first, _ in turns] == [row["response"] for row in stored[:3]]
    assert any(second for _, second in turns)

    with pytest.raises(SystemExit):
        main(["predict", *build(data__predict_prompts=folder / "eval.jsonl"), last, "--format=mt_bench"])
    assert "prompt 'eval0' has no 'question_id', which predict --format mt_bench" in capsys.readouterr().err


def test_the_saved_config_and_the_exported_policy_answer_alike(
    trained: tuple[Path, Arguments], tmp_path: Path
) -> None:
    folder, _ = trained
    arguments = ["--config", str(folder / "run/config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    arguments += [
        f"--model.policy.pretrained={folder}/run/policy",
        f"--data.predict_prompts={folder}/eval.jsonl",
    ]
    main(["predict", *arguments])
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    stored = answers(folder / "run/evaluations/001/rollouts.parquet")
    assert [row["response"] for row in found] == [row["response"] for row in stored]


def test_fast_dev_run_keeps_nothing(
    trained: tuple[Path, Arguments], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, build = trained
    main(["fit", *build(trainer__default_root_dir=tmp_path / "dev", trainer__fast_dev_run="true")])
    assert not (tmp_path / "dev").exists()
    assert "Iterations" in capsys.readouterr().out
