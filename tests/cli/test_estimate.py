"""The command ``estimate``, and the check that ``fit`` makes of the same figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from support.memory import workload
from support.models import byte_tokenizer
from support.runs import cli_arguments
from transformers import LlamaConfig

from sppo_lightning.__main__ import main
from sppo_lightning.cli.estimate import planned_hardware, planned_sharding
from sppo_lightning.memory.check import check_memory
from sppo_lightning.memory.workload import Workload
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.training.hardware import Hardware
from sppo_lightning.types import Ranks, UserError

ROOT = Path(__file__).parents[2]
WritePrompts = Callable[..., Path]


@pytest.fixture(scope="module")
def models_of_8b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reward model of Llama-3.1-8B's shape: their settings, no weights."""
    shape = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    }
    folders = []
    for name, changes in (("CausalLM", {}), ("SequenceClassification", {"num_labels": 1})):
        folder = tmp_path_factory.mktemp(name)
        LlamaConfig(architectures=[f"LlamaFor{name}"], **shape, **changes).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def estimated(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[dict[str, list[float]], str]:
    """Rows of the table by name, and what went to standard error."""
    main(["estimate", *args])
    printed = capsys.readouterr()
    rows = [
        line.rsplit(maxsplit=4) for line in printed.out.splitlines() if line.startswith(("policy", "total"))
    ]
    return {name: [float(cell) for cell in cells] for name, *cells in rows}, printed.err


@pytest.mark.parametrize(
    ("config", "memory", "policy", "fullest"),
    [
        # embedding and head in bfloat16, the rest in 4 bits, an adapter of 64 in float32
        ("qlora-8b-1gpu", 24, 2 * 128256 * 4096 * 2 + 6.98e9 * 0.516 + 168e6 * 4, 12.2),
        ("lora-8b-1gpu", 80, 8.03e9 * 2 + 168e6 * 4, 32.3),
        ("cluster/lora-8b-4nodes", 80, 8.03e9 * 2 + 168e6 * 4, 33.0),
        ("cluster/full-8b-8gpu", 80, 8.03e9 * 4 / 8, 53.0),
    ],
)
@pytest.mark.slow
def test_the_configs_of_8b_need_what_they_say(
    models_of_8b: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    config: str,
    memory: int,
    policy: float,
    fullest: float,
) -> None:
    found, _ = estimated(
        capsys,
        f"--config={ROOT / 'configs' / config}.yaml",
        f"--memory={memory}",
        f"--model.policy.pretrained={models_of_8b[0]}",
        f"--data.reward.init_args.pretrained={models_of_8b[1]}",
    )
    assert found["policy"] == pytest.approx([policy / 2**30] * 4, rel=0.01)
    assert max(found["total"]) == pytest.approx(fullest, rel=0.02)
    said = (ROOT / f"configs/{config}.yaml").read_text().split("seed_everything")[0]
    assert f"{fullest:.1f}" in said or f"{fullest:.0f}" in said


def test_a_run_that_does_not_fit_is_refused_and_may_be_tried(
    tiny_policy: Path,
    write_prompts: WritePrompts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any weight is read; what it proposes helps."""
    monkeypatch.setattr("sppo_lightning.memory.check.available_bytes", lambda device: 1 << 20)
    args = ["fit", *cli_arguments(tiny_policy, write_prompts(), tmp_path / "run", data__iterations=1)]
    with monkeypatch.context() as patch:
        patch.setattr("sppo_lightning.policy.loading.load_policy", None)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r" needs about 0\.\d GiB, but cpu has 0\.0 GiB: ", said)
    assert said.endswith("; or try it with data.memory_check=warn")
    with pytest.warns(UserWarning, match=r"^This run may not fit: "):
        main([*args, "--data.memory_check=warn"])
    assert (tmp_path / "run/policy").exists()


def test_estimating_reads_and_writes_nothing(
    tiny_policy: Path,
    write_prompts: WritePrompts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sppo_lightning.policy.loading.load_policy", None)
    args = cli_arguments(tiny_policy, tmp_path / "no-such-prompts.jsonl", tmp_path / "run")
    found, _ = estimated(capsys, *args)
    assert len(found["total"]) == 4
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_needs_its_size(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = cli_arguments(tiny_policy, tmp_path / "none.jsonl", tmp_path / "run", trainer__accelerator="gpu")
    with pytest.raises(SystemExit):
        main(["estimate", *args])
    assert "this machine has no GPU to compare with: say how much memory the run's has, e.g. --memory 24" in (
        capsys.readouterr().err
    )
    assert estimated(capsys, *args, "--memory=24")[0]["total"][0] >= 0.7  # a GPU's context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer.precision": "bf16-true"},
            "trainer.precision=bf16-true holds the trained weights in 16 bits",
        ),
        ({"memory": 0}, "--memory 0: give the GiB of one device, e.g. --memory 24"),
        ({"memory": "-1.5"}, "--memory -1.5: give the GiB of one device"),
        ({"trainer.accelerator": "mps"}, "trainer.accelerator=mps: only the memory of CPUs and CUDA GPUs"),
    ],
)
def test_what_cannot_be_estimated(
    tiny_policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *cli_arguments(tiny_policy, tmp_path / "none.jsonl", tmp_path / "run", **changes)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_server_is_asked(tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = {
        "data.reward": "sppo_lightning.rewards.ServerReward",
        "data.reward.function": None,
        "data.reward.base_url": "http://127.0.0.1:9",
        "data.reward.format": "sppo_lightning.rewards.JSONRewards",
    }
    found, _ = estimated(capsys, *cli_arguments(tiny_policy, tmp_path / "x", tmp_path / "run", **reward))
    assert "reward model" not in found


@pytest.mark.slow
def test_scaled_gradients_that_are_clipped_take_more(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AdamW cannot be fused then, and a GPU updates all weights at once."""
    args = cli_arguments(
        tiny_policy,
        tmp_path / "x",
        tmp_path / "run",
        trainer__accelerator="gpu",
        trainer__precision="16-mixed",
    )
    seen: list[Workload] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sppo_lightning.cli.estimate.diagnosis", lambda estimator, load, found: seen.append(load)
        )
        for clip in ([], ["--trainer.gradient_clip_val=1"]):
            estimated(capsys, *args, "--memory=24", *clip)
    assert [load.clips_unscaled for load in seen] == [False, True]
    assert {load.hardware.compute_dtype for load in seen} == {torch.float16}


def trainer_settings(**changes: Any) -> Namespace:
    """The ``trainer`` section of a config."""
    usual = {"accelerator": "gpu", "devices": 8, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    return Namespace({**usual, **changes})


@pytest.mark.parametrize(
    ("accelerator", "devices", "nodes", "expected"),
    [
        ("gpu", 8, 2, ("cuda", 16)),
        ("cuda", "4", 1, ("cuda", 4)),
        ("gpu", [0, 2], 1, ("cuda", 2)),
        ("gpu", "0,2,", 1, ("cuda", 2)),
        ("gpu", "auto", 1, ("cuda", 1)),
        ("gpu", -1, 3, ("cuda", 3)),
        ("auto", "auto", 1, ("cpu", 1)),
        ("cpu", 2, 1, ("cpu", 2)),
    ],
)
def test_hardware_of_a_trainer(
    accelerator: str, devices: Any, nodes: int, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = trainer_settings(accelerator=accelerator, devices=devices, num_nodes=nodes)
    found = planned_hardware(settings, torch.float32)
    assert found == Hardware(
        torch.device(expected[0]), expected[1], sharded=False, compute_dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("accelerator", "precision", "expected"),
    [
        ("gpu", "16-mixed", torch.float16),
        ("cuda", 16, torch.float16),
        ("gpu", "bf16-mixed", torch.bfloat16),
        ("cpu", "16-mixed", torch.bfloat16),
    ],
)
def test_a_gpu_computes_in_float16_though_a_cpu_does_not(
    accelerator: str, precision: Any, expected: torch.dtype
) -> None:
    settings = trainer_settings(accelerator=accelerator, precision=precision)
    assert planned_hardware(settings, torch.bfloat16).compute_dtype == expected


def test_a_strategy_that_fit_refuses_is_refused() -> None:
    for name in (
        "fsdp",
        "deepspeed_stage_3",
        Namespace(class_path="lightning.pytorch.strategies.FSDPStrategy"),
    ):
        with pytest.raises(
            UserError, match=r"is not supported: use one device or ddp; for a model larger than a"
        ):
            planned_sharding(trainer_settings(strategy=name))


def test_weights_may_be_sharded_over_all_processes() -> None:
    def settings(**sizes: int) -> Namespace:
        strategy = Namespace(
            class_path="lightning.pytorch.strategies.ModelParallelStrategy", init_args=Namespace(sizes)
        )
        return trainer_settings(num_nodes=2, strategy=strategy)

    found = planned_hardware(settings(data_parallel_size=16, tensor_parallel_size=1), torch.bfloat16)
    assert found == Hardware(torch.device("cuda"), 16, sharded=True, compute_dtype=torch.bfloat16)
    given = r"data_parallel_size=8, tensor_parallel_size=auto for 16 processes: .* \{data_parallel_size: 16, tensor"
    with pytest.raises(UserError, match=given):
        planned_sharding(settings(data_parallel_size=8))


class TwoRanks(Ranks):
    """The first or second of two processes, the other one with less memory; ``said``: what the first one says."""

    world_size = 2

    def __init__(self, rank: int, said: Any = None) -> None:
        self.rank, self.said = rank, said

    def barrier(self, name: str) -> None:
        raise AssertionError

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values, [1 << 20]]

    def same(self, value: Any) -> Any:
        self.said = value if self.rank == 0 else self.said
        return self.said


@pytest.mark.slow
def test_all_processes_decide_alike(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the least memory that one of them has."""
    load = workload(
        policy=PolicyConfig(str(tiny_policy)),
        batch_size=2,
        pairs_per_step=4,
        processes=2,
        compute_dtype=torch.float32,
    )
    first = TwoRanks(0)
    with pytest.raises(UserError, match="needs about") as refused:
        check_memory(load, first, otherwise="refuse")
    monkeypatch.setattr("sppo_lightning.memory.check.Estimator", None)  # the second asks nobody
    with pytest.raises(UserError) as also:
        check_memory(load, TwoRanks(1, first.said), otherwise="refuse")
    assert str(also.value) == str(refused.value)
    with pytest.warns(UserWarning, match=r"^The run's memory could not be estimated \("):
        check_memory(load, first, otherwise="refuse")
