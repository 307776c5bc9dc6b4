"""Whole runs on models other than plain decoders of text: trained, stored, exported, and the policy's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.models import byte_tokenizer
from support.runs import cli_arguments
from support.tiny import TRAINED_CONFIGS, new_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3_5Config

from sppo_lightning.__main__ import main

WritePrompts = Callable[..., Path]
EYES = '{"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}'
QWEN = Qwen3_5Config(
    text_config={**TRAINED_CONFIGS["qwen3_5"].to_dict(), "vocab_size": 264},  # its tokenizer has one more
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 32,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 32,
    },
)
LORA = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8}


@pytest.fixture
def fit(write_prompts: WritePrompts, tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny model of a kind; returns the run's folder, the model lies beside it."""

    def run(kind: str, **changes: Any) -> Path:
        if kind == "qwen3_5_seeing":  # new_model would leave its eyes out, as training does
            torch.manual_seed(0)
            whole = AutoModelForImageTextToText.from_config(QWEN).bfloat16()
            whole.save_pretrained(tmp_path / "model")
        else:
            new_model(kind).save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "model/preprocessor_config.json").write_text(EYES)
        main(["fit", *cli_arguments(tmp_path / "model", write_prompts(), tmp_path / "run", **changes)])
        return tmp_path / "run"

    return run


def check_pairs(run: Path, model: Any) -> None:
    """The reference's log-probs are those of the model that the run began with, read plainly."""
    pairs = pq.read_table(run / "iterations/000/pairs.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        prompt, response = pair["prompt_token_ids"], pair["chosen_token_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logps = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logps.gather(-1, torch.tensor(response)[:, None]).sum().item()
        assert pair["reference_chosen_logp"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3_5",
        "gpt_oss",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lfm2", "granite_hybrid", "deepseek_v3")),
    ],
)
def test_layers_of_other_kinds(kind: str, fit: Callable[..., Path]) -> None:
    run = fit(kind)
    check_pairs(run, new_model(kind).eval())
    main(["export", str(run), "--format", "hf"])
    trained, exported = (load_file(run / place / "model.safetensors") for place in ("policy", "export-hf"))
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)
    assert AutoModelForCausalLM.from_pretrained(run / "export-hf").config.use_cache


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "qwen3_5",
        pytest.param("gemma3_seeing", marks=pytest.mark.slow),
        pytest.param("mistral3_seeing", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_on_them(kind: str, quantization: str, fit: Callable[..., Path]) -> None:
    run = fit(kind, model__policy__quantization=quantization, **LORA)
    weights = load_file(run / "policy/adapter_model.safetensors")
    assert weights
    assert not [name for name in weights if re.search("vision|multi_modal", name)]
    for format in ("adapter", "merged"):
        main(["export", str(run), "--format", format])  # compares log-probs
    merged = AutoModelForImageTextToText if kind == "mistral3_seeing" else AutoModelForCausalLM
    assert merged.from_pretrained(run / "export-merged").config.get_text_config().use_cache
    prepared = run / "export-merged/preprocessor_config.json"
    assert (prepared.read_text() == EYES) if kind.endswith("_seeing") else not prepared.exists()
    loaded_by_peft = "AutoPeftModelForCausalLM" in (run / "export-adapter/README.md").read_text()
    assert loaded_by_peft == (kind != "mistral3_seeing")
    assert loaded_by_peft == ("AutoPeftModelForCausalLM" in (run / "policy/README.md").read_text())


@pytest.mark.parametrize(
    "kind",
    [
        "gemma3_seeing",
        pytest.param("gemma4_seeing", marks=pytest.mark.slow),
        pytest.param("mistral3_seeing", marks=pytest.mark.slow),
    ],
)
def test_eyes_stay_as_they_were(kind: str, fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(kind)
    check_pairs(run, new_model(kind).eval())
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "model", run / "policy"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    constant = {name for name in before if name.endswith("layer_scalar")}  # of Gemma 4
    assert same - constant == {name for name in before if re.search("vision|multi_modal", name)} != set()
    main(["export", str(run), "--format", "hf"])
    for place in ("policy", "export-hf"):
        assert (run / place / "preprocessor_config.json").read_text() == EYES
    text = (run / "export-hf/README.md").read_text()
    assert ("AutoModelForImageTextToText" in text) == (kind == "mistral3_seeing")


def test_qwen_is_trained_and_written_without_its_eyes(fit: Callable[..., Path], tmp_path: Path) -> None:
    """Its weights lie under other names beside eyes, their dtype in the settings of the text."""
    run = fit("qwen3_5_seeing", **LORA)
    main(["export", str(run), "--format", "merged"])
    before, after = (
        load_file(place / "model.safetensors") for place in (tmp_path / "model", run / "export-merged")
    )
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert after.keys() == {name for name in before if "visual" not in name} < before.keys()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert "model.language_model.embed_tokens.weight" in same
    assert not [name for name in same if name.endswith("self_attn.q_proj.weight")]
