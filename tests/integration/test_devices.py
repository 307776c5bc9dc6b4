"""What must come out alike on a CPU and on a GPU: the same checks on either, against what a CPU finds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import load_file
from support.models import byte_tokenizer, tiny_config
from support.rewards import questions
from support.runs import cli_arguments
from support.sampling import EARLY, GROUPS, PROMPTS, answer, by_seed, engine, greedy, sampled
from support.tiny import (
    Source,
    alone,
    batch_of,
    close_gradients,
    gradients,
    new_model,
    pairs_of,
)
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from sppo_lightning.__main__ import main
from sppo_lightning.pair_forward import PlainForward, SharedForward, VarlenForward
from sppo_lightning.pair_forward.layouts import PairLayout, PlainLayout, SharedLayout
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.rewards import SequenceClassificationReward

PAD = 2
WritePrompts = Callable[..., Path]


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reward model whose blocks of quantisation are 64 weights long."""
    folders = []
    config = {"hidden_size": 64, "intermediate_size": 128}
    for kind, changes in ((LlamaForCausalLM, {}), (LlamaForSequenceClassification, {"num_labels": 1})):
        folders.append(tmp_path_factory.mktemp("model"))
        torch.manual_seed(0)
        kind(tiny_config(**config, **changes)).save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
    return folders[0], folders[1]


# ---------------------------------------------------------------- generation


def test_greedy_answers(device: torch.device) -> None:
    expected = [one.token_ids for one in greedy(Source(new_model().eval(), EARLY), PROMPTS)]
    found = greedy(Source(new_model().eval().to(device), EARLY), PROMPTS)  # type: ignore[arg-type]
    assert [one.token_ids for one in found] == expected


def test_samples_depend_on_their_seeds_alone(device: torch.device) -> None:
    source = Source(new_model().eval().to(device), EARLY)  # type: ignore[arg-type]
    expected = sampled(source, GROUPS, batch_size=30)
    assert len(set(expected.values())) > 10
    assert sampled(source, GROUPS[::-1], batch_size=7) == expected


def test_a_batch_that_the_device_refuses_is_halved(device: torch.device) -> None:
    """The refusal is the allocator's own."""
    source = Source(new_model().eval().to(device), EARLY)  # type: ignore[arg-type]
    expected = sampled(source, GROUPS)
    generator = engine(source)

    def ask_for_too_much(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, width = kwargs["attention_mask"].shape
        if rows * width > 200:
            torch.empty(1 << 60, dtype=torch.uint8, device=device)

    handle = source.model.register_forward_pre_hook(ask_for_too_much, with_kwargs=True)
    try:
        with pytest.warns(UserWarning, match="did not fit into memory"):
            found = answer(generator, GROUPS)
    finally:
        handle.remove()
    assert by_seed(GROUPS, found) == expected


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("forward_class", [PlainForward, SharedForward])
def test_logps_and_gradients(
    device: torch.device, forward_class: type[PlainForward] | type[SharedForward]
) -> None:
    cpu_model = new_model().eval()
    expected = alone(cpu_model, pairs_of())
    model, forward = new_model().eval().to(device), forward_class()  # type: ignore[arg-type]
    rows = move_data_to_device(batch_of(pairs_of(), forward.layout(PAD)).rows, device)
    found = forward.token_logps(model, rows)
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=0, atol=1e-4)
    on_cpu = {name: gradient.cpu() for name, gradient in gradients(model, found).items()}
    close_gradients(on_cpu, gradients(cpu_model, expected), tolerance=1e-3)


@pytest.mark.gpu
def test_the_variable_length_kernel_in_a_model() -> None:
    """Against the plain forward of the same bfloat16 model."""
    found = []
    for forward in (PlainForward(), VarlenForward()):
        model = new_model(dtype=torch.bfloat16).eval().to("cuda")  # type: ignore[arg-type]
        rows = move_data_to_device(batch_of(pairs_of(), forward.layout(PAD)).rows, "cuda")
        logps = forward.token_logps(model, rows)
        weights = torch.cat([each.flatten().float() for each in gradients(model, logps).values()])
        found.append((logps.detach(), weights))
        forward.release(model)
    (plain, plain_gradient), (varlen, varlen_gradient) = found
    torch.testing.assert_close(varlen, plain, rtol=0.05, atol=0.1)
    assert torch.cosine_similarity(varlen_gradient, plain_gradient, dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [PlainLayout(PAD), SharedLayout()])
def test_micro_batches_can_be_pinned(layout: PairLayout) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    rows = batch_of(pairs_of(), layout).rows
    pinned = pin_memory(rows)
    assert pinned.input_ids.is_pinned()
    assert torch.equal(pinned.position_ids, rows.position_ids)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_run(
    device: torch.device,
    models: tuple[Path, Path],
    write_prompts: WritePrompts,
    tmp_path: Path,
    quantization: str,
) -> None:
    """Its own checks pass: log-ratios are 0 at the start, the reference does not move, the policy does."""
    changes: dict[str, Any] = {
        "trainer.accelerator": {"cuda": "gpu"}.get(device.type, device.type),
        "trainer.devices": 1,
        "trainer.precision": "bf16-mixed",
        "trainer.gradient_clip_val": 1.0,
        "model.policy.quantization": quantization,
        "model.policy.lora.rank": 4,
        "model.policy.lora.alpha": 8,
        "model.policy.gradient_checkpointing": "true",
        "model.optimizer": "bitsandbytes.optim.PagedAdamW8bit",
        "model.learning_rate": 1e-2,
        "data.eval_prompts": write_prompts("eval.jsonl", count=4, start=50),
        "data.reward": "sppo_lightning.rewards.SequenceClassificationReward",
        "data.reward.function": None,
        "data.reward.pretrained": models[1],
        "data.reward.quantization": quantization,
    }
    main(["fit", *cli_arguments(models[0], write_prompts(), tmp_path / "run", **changes)])
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3)
    trained = load_file(tmp_path / "run/policy/adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in trained.values())
    assert any(weight.count_nonzero() for name, weight in trained.items() if "lora_B" in name)


def test_a_policy_has_one_fingerprint(device: torch.device) -> None:
    model = new_model()
    before = fingerprint(model, "x")
    assert fingerprint(model.to(device), "x") == before  # type: ignore[arg-type]
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert fingerprint(model, "x") != before


# -------------------------------------------------------------------- reward


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_reward_model_goes_to_the_host_and_comes_back(
    device: torch.device, models: tuple[Path, Path], quantization: Any
) -> None:
    reward = SequenceClassificationReward(str(models[1]), quantization=quantization, between_phases="host")
    reward.check()
    found = []
    for _ in range(2):
        reward.load(device)
        model: Any = reward._model
        assert {parameter.device for parameter in model.parameters()} == {device}
        found.append(reward.score(*questions()).rewards)
        reward.unload()
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert found[1] == pytest.approx(found[0], rel=0, abs=1e-5)
    assert len(set(found[0])) == 5
