"""Adapters: fresh ones of every kind, and ones to start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from support.models import byte_tokenizer, tiny_config
from support.tiny import batch_of, gradients, pairs_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from sppo_lightning.pair_forward import PlainForward, SharedForward
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.loading import load_policy, meta_model
from sppo_lightning.policy.lora import copied_weights, replaced_weights, with_adapter
from sppo_lightning.types import UserError

LORA = LoRAConfig(rank=4, alpha=8)


def load(policy: Path, lora: LoRAConfig, **settings: Any) -> Any:
    return load_policy(PolicyConfig(str(policy), lora=lora, **settings), compute_dtype=torch.float32)


def logps(model: nn.Module) -> Tensor:
    forward = PlainForward()
    return forward.token_logps(model, batch_of(pairs_of(), forward.layout(2)).rows)


def trained(model: nn.Module) -> nn.Module:
    """Give an adapter weights that do something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def adapter(tiny_policy: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny policy, in PEFT's layout."""
    model = trained(load(tiny_policy, LoRAConfig(rank=3, alpha=9, target_modules=["q_proj", "up_proj"])))
    write_folder(model, byte_tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter"


# ------------------------------------------------------------------------ fresh


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_other_kinds_of_adapters_train_and_share_prompts(
    tmp_path: Path, kind: str, quantization: Any
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    model = load(tmp_path, LoRAConfig(rank=4, alpha=8, **{kind: True}), quantization=quantization).train()
    trained(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == (4.0 if kind == "rslora" else 2.0)
    assert layer.use_dora["default"] is (kind == "dora")
    expected = logps(model)
    shared = SharedForward()
    found = shared.token_logps(model, batch_of(pairs_of(), shared.layout(2)).rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert len(gradients(model, found)) == 14 * (3 if kind == "dora" else 2)


def test_target_modules_by_name(tiny_policy: Path) -> None:
    model = load(tiny_policy, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all("q_proj" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query", "value"], r"model\.policy\.lora\.target_modules: .*query.*not found.*"),
        (
            ["q_proj", "k_prj"],
            r"model\.policy\.lora\.target_modules: 'k_prj' matches no layer of the model; what the others match: "
            "q_proj",
        ),
    ],
)
def test_target_modules_that_match_nothing(tiny_policy: Path, targets: list[str], message: str) -> None:
    """Found without the weights."""
    config = PolicyConfig(str(tiny_policy), lora=LoRAConfig(rank=4, alpha=8, target_modules=targets))
    with pytest.raises(UserError, match=f"^{message}$"):
        meta_model(config, AutoConfig.from_pretrained(tiny_policy), compute_dtype=torch.float32)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_embedding_is_not_adapted(target: str) -> None:
    lora = LoRAConfig(rank=2, alpha=2, target_modules=["q_proj", target])
    with pytest.raises(UserError, match=r"adapts the embedding or the head, which share their weights"):
        with_adapter(LlamaForCausalLM(tiny_config(tie_word_embeddings=True)), lora, pretrained="x")
    assert with_adapter(LlamaForCausalLM(tiny_config()), lora, pretrained="x") is not None


def test_a_meta_device_model_has_the_policys_weights_but_not_their_values(tiny_policy: Path) -> None:
    config = PolicyConfig(str(tiny_policy), lora=LORA, gradient_checkpointing=True)
    empty = meta_model(config, AutoConfig.from_pretrained(tiny_policy), compute_dtype=torch.bfloat16)
    model = load_policy(config, compute_dtype=torch.bfloat16)

    def shapes(of: nn.Module) -> dict[str, Any]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in of.named_parameters()}

    assert shapes(empty) == shapes(model)
    assert all(parameter.is_meta for parameter in empty.parameters())


# ------------------------------------------------------------------ to start from


def test_a_run_starts_from_an_adapter(tiny_policy: Path, adapter: Path) -> None:
    model = load(tiny_policy, LoRAConfig(adapter=str(adapter), dropout=0.5)).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    own = {name.replace(".default", ""): value for name, value in copied_weights(model).items()}
    assert own.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in own.items())
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter)
    with torch.no_grad():
        torch.testing.assert_close(logps(model), logps(peft), rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 9, 0.5)


def test_what_is_written_finds_its_base_again(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    by_transformers = AutoModelForCausalLM.from_pretrained(adapter).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(by_peft(ids).logits, by_transformers(ids).logits, rtol=0, atol=1e-6)


def changed_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_shapes(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(path), name: torch.zeros(3, 48)}, path)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, r"cannot be read as an adapter .*: give a folder with adapter_config\.json and"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"has no weights that can be read",
    ),
    "other base": (
        lambda folder: changed_config(folder, base_model_name_or_path="other/model"),
        r"was made for other/model, but model\.policy\.pretrained='.*': give the adapter's own base; if they are the "
        r"same model, set model\.policy\.lora\.ignore_adapter_base=true",
    ),
    "other shapes": (
        other_shapes,
        r"was made for another base than model\.policy\.pretrained='.*': "
        r"base_model\.model\.model\.layers\.1\.self_attn\.q_proj\.lora_A\.weight is 3 x 48 in the adapter, 3 x 32 on "
        "the model",
    ),
    "more layers": (
        lambda folder: changed_config(folder, target_modules=["q_proj"]),
        r"layers\.0\.mlp\.up_proj\.lora_A\.weight is 3 x 32 in the adapter, absent on the model",
    ),
    "other kind": (
        lambda folder: changed_config(folder, peft_type="IA3"),
        r"is a IA3 adapter: only LoRA adapters can be trained here",
    ),
    "not everywhere": (
        lambda folder: changed_config(folder, alora_invocation_tokens=[5, 6]),
        r"is more than low-rank matrices on its base \(alora_invocation_tokens\): merge it",
    ),
    "another base in truth": (
        lambda folder: changed_config(folder, init_lora_weights="pissa"),
        r"is more than low-rank matrices on its base \(init_lora_weights=pissa\): merge it",
    ),
    "a huge rank": (
        lambda folder: changed_config(folder, r=10**9),
        r"1000000000 is no rank for this model: give a number from 1 to",
    ),
    "a huge rank of one layer": (
        lambda folder: changed_config(folder, rank_pattern={"q_proj": 10**9}),
        r"1000000000 is no rank for this model: give a number from 1 to",
    ),
    "a pattern without end": (
        lambda folder: changed_config(folder, target_modules=r"(\w+\.?)+x"),
        r"cannot be put on model\.policy\.pretrained='.*' \(OutOfTimeError: not done after 0\.5 s\): is that",
    ),
    "no number": (
        lambda folder: changed_config(folder, lora_alpha="x"),
        r"cannot be put on model\.policy\.pretrained='.*' \(TypeError: .*\): is that its base, and adapter_config",
    ),
    "layers of another model": (
        lambda folder: changed_config(folder, target_modules=["query"]),
        r"cannot be put on model\.policy\.pretrained='.*' \(.*query.*\): is that its base",
    ),
    "more than matrices": (
        lambda folder: changed_config(folder, modules_to_save=["lm_head"], bias="all"),
        r"is more than low-rank matrices on its base \((bias, modules_to_save|modules_to_save, bias)\): merge it",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_adapter_that_does_not_fit(
    tiny_policy: Path, adapter: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without the model's weights."""
    monkeypatch.setattr("sppo_lightning.policy.lora.LONGEST_SECONDS", 0.5)
    spoil, message = SPOILED[case]
    spoil(adapter)
    config = PolicyConfig(str(tiny_policy), lora=LoRAConfig(adapter=str(adapter)))
    with pytest.raises(UserError, match=rf"^model\.policy\.lora\.adapter(='.*/adapter' .*|: ){message}"):
        meta_model(config, AutoConfig.from_pretrained(tiny_policy), compute_dtype=torch.float32)


def test_another_model_under_the_same_name_does_not(tiny_policy: Path, adapter: Path, tmp_path: Path) -> None:
    twin = tmp_path / "other" / tiny_policy.name
    shutil.copytree(tiny_policy, twin)
    with pytest.raises(
        UserError, match=r"was made for .*, but model\.policy\.pretrained='.*': give the adapter's own"
    ):
        load(twin, LoRAConfig(adapter=str(adapter)))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva"])
def test_however_an_adapter_began_its_weights_are_taken(tiny_policy: Path, adapter: Path, start: str) -> None:
    changed_config(adapter, init_lora_weights=start)
    model = load(tiny_policy, LoRAConfig(adapter=str(adapter)), quantization="nf4")
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all(
        torch.equal(value, stored[name.replace(".default", "")])
        for name, value in copied_weights(model).items()
    )


def test_a_copy_of_the_base_serves(tiny_policy: Path, adapter: Path, tmp_path: Path) -> None:
    changed_config(adapter, base_model_name_or_path=f"someone/{tiny_policy.name.upper()}")
    load(tiny_policy, LoRAConfig(adapter=str(adapter)))


def test_weights_stand_in_and_go(tiny_policy: Path) -> None:
    model = load(tiny_policy, LORA)
    first, before = copied_weights(model), fingerprint(model, "x")
    trained(model)
    after = fingerprint(model, "x")
    with replaced_weights(model, first):
        assert fingerprint(model, "x") == before
    assert fingerprint(model, "x") == after != before
