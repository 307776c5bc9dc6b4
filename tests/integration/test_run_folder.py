"""One tiny run through the real command line: its files, columns, counts and invariants."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.runs import cli_arguments, letter_reward
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppo_lightning.__main__ import main

END = 1  # the byte tokenizer's <eos>


@pytest.fixture(scope="module")
def run(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations with held-out prompts."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["river", "stone", "cloud", "amber", "violet", "copper", "meadow", "falcon", "harbor", "lantern"]
    for name, start in (("train", 0), ("eval", 100)):
        records = [
            {"id": f"{name}{n}", "prompt": f"Say {words[n % 10]} {n + start} times"} for n in range(14)
        ]
        if name == "train":
            records.append({"id": "long", "prompt": "far too long " * 40})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = cli_arguments(
        tiny_policy,
        folder / "train.jsonl",
        folder / "run",
        data__eval_prompts=folder / "eval.jsonl",
        data__max_prompt_tokens=100,
        trainer__callbacks=json.dumps(
            [
                {"class_path": "sppo_lightning.callbacks.DifficultyReestimation"},
                {
                    "class_path": "sppo_lightning.callbacks.PolicyExport",
                    "init_args": {"keep_every_iteration": True},
                },
            ]
        ),
    )
    main(["fit", *arguments])
    return folder / "run"


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path, partitioning=None).to_pylist()


def rollouts(run: Path, iteration: int) -> dict[tuple[str, int], dict[str, Any]]:
    files = sorted((run / f"iterations/{iteration:03d}/rollouts").glob("*.parquet"))
    return {(row["prompt_id"], row["sample_index"]): row for file in files for row in rows(file)}


def test_every_file_is_there(run: Path) -> None:
    expected = ["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "policy/config.json", "samples.md"]
    expected += ["report.html", "environment.json"]
    expected += ["policy/model.safetensors", "policy/tokenizer.json"]
    for iteration in ("000", "001"):
        expected += [
            f"iterations/{iteration}/{name}"
            for name in ("difficulty.parquet", "pairs.parquet", "manifest.json")
        ]
    expected += [f"evaluations/{number:03d}/rollouts.parquet" for number in range(3)]
    assert [name for name in expected if not (run / name).exists()] == []
    assert not list(run.rglob("*.tmp"))


def test_columns_are_the_designed_ones(run: Path) -> None:
    iteration = run / "iterations/001"
    assert pq.read_schema(next((iteration / "rollouts").glob("*.parquet"))).names == [
        "prompt_id",
        "sample_index",
        "prompt",
        "response",
        "token_ids",
        "finish_reason",
        "reward",
        "reward_parts",
        "drop_reason",
    ]
    assert pq.read_schema(iteration / "difficulty.parquet").names == [
        "prompt_id",
        "difficulty",
        "estimated_iteration",
        "mean_reward",
        "std_reward",
        "min_reward",
        "max_reward",
        "samples",
        "selected",
    ]
    assert pq.read_schema(iteration / "pairs.parquet").names == [
        "prompt_id",
        "prompt_token_ids",
        "chosen_token_ids",
        "rejected_token_ids",
        "chosen",
        "rejected",
        "chosen_reward",
        "rejected_reward",
        "reference_chosen_logp",
        "reference_rejected_logp",
        "chosen_win_probability",
        "rejected_win_probability",
        "chosen_sample_index",
        "rejected_sample_index",
    ]


@pytest.mark.parametrize("iteration", [0, 1])
def test_what_goes_in_comes_out_or_is_counted(run: Path, iteration: int) -> None:
    manifest = json.loads((run / f"iterations/{iteration:03d}/manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["counts"]["prompts"] == 15
    assert manifest["dropped"]["too_long"] == 1
    assert manifest["counts"]["pairs"] + sum(manifest["dropped"].values()) == 15
    assert manifest["counts"]["pairs"] == len(rows(run / f"iterations/{iteration:03d}/pairs.parquet"))


@pytest.mark.parametrize("iteration", [0, 1])
def test_difficulty_is_the_mean_probe_reward_and_the_easiest_are_selected(run: Path, iteration: int) -> None:
    table = rows(run / f"iterations/{iteration:03d}/difficulty.parquet")
    sampled = rollouts(run, iteration)
    for row in table:
        probe = [sampled[row["prompt_id"], index]["reward"] for index in range(2)]
        assert row["difficulty"] == pytest.approx(sum(probe) / 2)
        assert row["estimated_iteration"] == iteration
        assert row["samples"] == 2
    selected = [row["difficulty"] for row in table if row["selected"]]
    left_out = [row["difficulty"] for row in table if not row["selected"]]
    assert len(selected) == 11  # 0.75 of 14, rounded half up
    assert min(selected) >= max(left_out)


@pytest.mark.parametrize("iteration", [0, 1])
def test_selected_prompts_are_topped_up_and_the_best_meets_the_worst(run: Path, iteration: int) -> None:
    sampled = rollouts(run, iteration)
    for pair in rows(run / f"iterations/{iteration:03d}/pairs.parquet"):
        answers = [sampled[pair["prompt_id"], index] for index in range(3)]
        assert pair["chosen_reward"] == max(answer["reward"] for answer in answers)
        assert pair["rejected_reward"] == min(answer["reward"] for answer in answers)
        assert pair["chosen_token_ids"] in [answer["token_ids"] for answer in answers]
        assert pair["rejected_token_ids"] in [answer["token_ids"] for answer in answers]


@pytest.mark.parametrize("iteration", [0, 1])
def test_no_end_token_is_invented_and_rewards_are_the_functions(run: Path, iteration: int) -> None:
    for row in rollouts(run, iteration).values():
        ends = [position for position, token in enumerate(row["token_ids"]) if token == END]
        if row["finish_reason"] == "stop":
            assert ends == [len(row["token_ids"]) - 1]
        else:
            assert ends == []
            assert len(row["token_ids"]) == 8
        assert row["reward"] == letter_reward([row["prompt"]], [row["response"]], [{}])[0]


def plain_logp(model: Any, prompt: list[int], response: list[int]) -> float:
    """Sum of log-probs of one sequence on its own, without padding."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt + response])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + n, token]) for n, token in enumerate(response))


@pytest.mark.parametrize("iteration", [0, 1])
def test_reference_is_the_policy_that_the_iteration_started_from(
    run: Path, tiny_policy: Path, iteration: int
) -> None:
    start = tiny_policy if iteration == 0 else run / "policies/000"
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    for pair in rows(run / f"iterations/{iteration:03d}/pairs.parquet"):
        for side in ("chosen", "rejected"):
            expected = plain_logp(model, pair["prompt_token_ids"], pair[f"{side}_token_ids"])
            assert pair[f"reference_{side}_logp"] == pytest.approx(expected, abs=1e-4)


def test_exported_policy_is_the_trained_one_and_has_moved(run: Path, tiny_policy: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    initial = AutoModelForCausalLM.from_pretrained(tiny_policy).state_dict()
    assert checkpoint
    for name, value in checkpoint.items():
        assert torch.equal(value, exported[name.removeprefix("policy.")])
    assert any(not torch.equal(value, initial[name]) for name, value in exported.items())
    assert AutoTokenizer.from_pretrained(run / "policy").chat_template is not None


def test_metrics_are_named_and_numbered(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    steps = [row for row in table if row["train/loss"]]
    assert [int(row["step"]) for row in steps] == list(range(len(steps)))
    assert math.isclose(float(steps[0]["train/loss"]), math.log(2), abs_tol=1e-6)
    assert float(steps[0]["train/logratios/chosen"]) == pytest.approx(0, abs=1e-4)
    evaluations = [row for row in table if row["val/reward/mean"]]
    assert len(evaluations) == 3
    assert float(evaluations[0]["val/win_rate"]) == 0.5
    iterations = [row for row in table if row["iteration/reward/mean"]]
    assert [float(row["iteration/number"]) for row in iterations] == [0, 1]
    for name in ("train/rewards/margin", "train/rewards/accuracy", "train/logps/chosen", "train/lr"):
        assert all(row[name] for row in steps)


def test_evaluations_belong_to_the_policy_after_each_iteration(run: Path) -> None:
    for number, folder in enumerate(["", "policies/000", "policies/001"]):
        answers = rows(run / f"evaluations/{number:03d}/rollouts.parquet")
        assert [row["prompt_id"] for row in answers] == [f"eval{n}" for n in range(14)]
        if folder:
            model = AutoModelForCausalLM.from_pretrained(run / folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(run / folder)
            for row in answers[:3]:
                encoded = tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["prompt"]}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                output = model.generate(**encoded, max_new_tokens=8, do_sample=False)[0]
                assert output[encoded["input_ids"].shape[1] :].tolist() == row["token_ids"]
