"""Settings of the loop that change what a run does, each in one tiny real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sppo_lightning.__main__ import main

WritePrompts = Callable[..., Path]
REESTIMATION = "sppo_lightning.callbacks.DifficultyReestimation"


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path, partitioning=None).to_pylist()


def fit(policy: Path, prompts: Path, root: Path, **changes: Any) -> Path:
    main(["fit", *cli_arguments(policy, prompts, root, **changes)])
    return root


def callback(**settings: Any) -> str:
    return json.dumps([{"class_path": REESTIMATION, "init_args": settings}])


def sequence_logp(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + n, token]) for n, token in enumerate(response))


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_initial_reference_stays_the_policy_that_the_run_started_from(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, precision: str
) -> None:
    """In double precision the weights that are read again have to be doubled as the trained ones are."""
    settings = {"model__reference": "initial", "trainer__precision": precision}
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", **settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    for iteration in ("000", "001"):
        for pair in read(root / f"iterations/{iteration}/pairs.parquet"):
            expected = sequence_logp(model, pair["prompt_token_ids"], pair["chosen_token_ids"])
            assert pair["reference_chosen_logp"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reference", ["initial", "previous_iteration"])
def test_lora_trains_an_adapter_only(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, reference: str
) -> None:
    settings = {
        "model__policy__lora__rank": 4,
        "model__policy__lora__alpha": 8,
        "model__reference": reference,
    }
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", **settings)
    trained = torch.load(root / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert trained
    assert all("lora_" in name for name in trained)
    assert (root / "policy/adapter_config.json").exists()
    if reference == "initial":
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
        for pair in read(root / "iterations/001/pairs.parquet"):
            expected = sequence_logp(model, pair["prompt_token_ids"], pair["rejected_token_ids"])
            assert pair["reference_rejected_logp"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_adapter_dropout_disturbs_neither_reference_nor_resuming(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """Dropout is on while training only: log-ratios start at 0, and a second run draws the same masks."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.3}
    settings = {f"model__policy__lora__{name}": value for name, value in lora.items()}
    one = fit(tiny_policy, write_prompts(), tmp_path / "one", **settings)
    torch.rand(3)
    two = fit(tiny_policy, write_prompts(), tmp_path / "two", **settings)
    trained = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)
    ]
    assert trained[0]
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_qlora_runs_on_the_cpu(write_prompts: WritePrompts, tmp_path: Path, quantization: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path / "policy")
    byte_tokenizer().save_pretrained(tmp_path / "policy")
    settings = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8}
    root = fit(
        tmp_path / "policy",
        write_prompts(),
        tmp_path / "run",
        model__policy__quantization=quantization,
        trainer__precision="bf16-mixed",
        **settings,
    )
    assert (root / "policy/adapter_model.safetensors").exists()
    assert (root / "iterations/001/pairs.parquet").exists()


def test_several_epochs_reuse_an_iterations_pairs(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", data__epochs_per_iteration=3)
    assert sorted(path.name for path in (root / "iterations").iterdir()) == ["000", "001"]
    steps = 0
    for iteration in ("000", "001"):
        steps += 3 * -(-len(read(root / f"iterations/{iteration}/pairs.parquet")) // 4)
    rows = (root / "metrics.csv").read_text().splitlines()
    loss = rows[0].split(",").index("train/loss")
    assert sum(bool(row.split(",")[loss]) for row in rows[1:]) == steps


def test_disjoint_splits_schedule_every_prompt_once(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    root = fit(
        tiny_policy,
        write_prompts(count=21),
        tmp_path / "run",
        data__schedule="sppo_lightning.selection.DisjointSplits",
    )
    seen = []
    for iteration in ("000", "001"):
        manifest = json.loads((root / f"iterations/{iteration}/manifest.json").read_text())
        assert manifest["dropped"]["not_scheduled"] in (10, 11)
        shards = (root / f"iterations/{iteration}/rollouts").glob("probe-*.parquet")
        seen.append({row["prompt_id"] for shard in shards for row in read(shard)})
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] == {f"p{n}" for n in range(21)}


def test_smoothing_mixes_old_and_new_estimates(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """difficulty(1) = 0.25 * (mean of iteration 0's probe) + 0.75 * (mean of the new probe)."""
    root = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        trainer__callbacks=callback(smoothing=0.25, samples=3),
    )
    first: dict[str, list[float]] = {}
    for shard in sorted((root / "iterations/000/rollouts").glob("probe-*.parquet")):
        for row in read(shard):
            first.setdefault(row["prompt_id"], []).append(row["reward"])
    for row in read(root / "iterations/001/difficulty.parquet"):
        old = sum(first[row["prompt_id"]]) / len(first[row["prompt_id"]])
        assert row["samples"] == 3
        assert row["difficulty"] == pytest.approx(0.25 * old + 0.75 * row["mean_reward"])


def test_without_reestimation_later_rollouts_still_count(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """Those of prompts that were not probed in the same iteration: a probe decides who is sampled further."""
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", data__iterations=3)
    assert not list((root / "iterations/001/rollouts").glob("probe-*.parquet"))
    for row in read(root / "iterations/001/difficulty.parquet"):
        assert (row["estimated_iteration"], row["samples"]) == (0, 2)
    before = {row["prompt_id"]: row for row in read(root / "iterations/001/difficulty.parquet")}
    for row in read(root / "iterations/002/difficulty.parquet"):
        again = before[row["prompt_id"]]["selected"]
        assert (row["estimated_iteration"], row["samples"]) == ((1, 3) if again else (0, 2))


def test_prompts_without_an_estimate_are_probed_as_ever(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``samples`` of the callback is for estimates that are made again; here there is none, which is said."""
    root = fit(
        tiny_policy,
        write_prompts(count=22),
        tmp_path / "run",
        data__schedule="sppo_lightning.selection.DisjointSplits",
        trainer__callbacks=callback(samples=1),
    )
    rows = [
        row for shard in (root / "iterations/001/rollouts").glob("probe-*.parquet") for row in read(shard)
    ]
    assert len(rows) == 2 * len({row["prompt_id"] for row in rows}) > 0
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "DifficultyReestimation has nothing to do: data.schedule DisjointSplits" in text for text in said
    )


def test_a_random_share_leaves_no_prompt_behind(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """Estimates that are not made again move by the mean change of those that are."""
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", trainer__callbacks=callback(share=0.5))
    before = {row["prompt_id"]: row["difficulty"] for row in read(root / "iterations/000/difficulty.parquet")}
    after = read(root / "iterations/001/difficulty.parquet")
    fresh = [row for row in after if row["estimated_iteration"] == 1]
    stale = [row for row in after if row["estimated_iteration"] == 0]
    assert fresh
    assert stale
    change = sum(row["difficulty"] - before[row["prompt_id"]] for row in fresh) / len(fresh)
    for row in stale:
        assert row["difficulty"] - before[row["prompt_id"]] == pytest.approx(change)


def test_a_probe_larger_than_the_pairs_samples_tops_nothing_up(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    root = fit(tiny_policy, write_prompts(), tmp_path / "run", data__probe_samples=6, data__iterations=1)
    assert not list((root / "iterations/000/rollouts").glob("topup-*.parquet"))
    rewards: dict[str, list[float]] = {}
    for shard in sorted((root / "iterations/000/rollouts").glob("*.parquet")):
        for row in read(shard):
            rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    for pair in read(root / "iterations/000/pairs.parquet"):
        first = rewards[pair["prompt_id"]][:3]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(first), min(first))


@pytest.mark.parametrize("curriculum", ["EasyToHard", "HardToEasy"])
def test_curriculum_orders_the_steps_by_difficulty(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, curriculum: str, monkeypatch: Any
) -> None:
    from sppo_lightning.training.batching import StepSampler

    orders: list[list[int]] = []
    original = StepSampler.__init__

    def record(self: StepSampler, order: list[int], **settings: Any) -> None:
        orders.append(order)
        original(self, order, **settings)

    monkeypatch.setattr(StepSampler, "__init__", record)
    root = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        data__curriculum=f"sppo_lightning.selection.{curriculum}",
        trainer__callbacks=callback(),
    )
    pairs = read(root / "iterations/001/pairs.parquet")
    table = {r["prompt_id"]: r["difficulty"] for r in read(root / "iterations/001/difficulty.parquet")}
    trained = [table[pairs[row]["prompt_id"]] for row in orders[-1]]
    assert trained == sorted(trained, reverse=curriculum == "EasyToHard")


def test_a_reward_model_with_a_chat_template_scores(
    tiny_policy: Path, tiny_reward_model: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    arguments = cli_arguments(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        data__reward="sppo_lightning.rewards.SequenceClassificationReward",
        data__reward__function=None,
        data__iterations=1,
    )
    main(["fit", *arguments, f"--data.reward.pretrained={tiny_reward_model}"])
    assert len(read(tmp_path / "run/iterations/000/pairs.parquet")) >= 4
