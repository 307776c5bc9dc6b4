"""What PEFT adds to a model, and how it is merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny_config
from support.tiny import new_model
from torch import nn
from transformers import LlamaForCausalLM

from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.merging import merge_into_base, merged_weight, merged_weights
from sppo_lightning.types import UserError

IDS = torch.arange(3, 40)[None]
LINEAR = ["q_proj", "down_proj"]


def adapted(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, targets: Any = "all-linear", **settings: Any
) -> Any:
    """An adapter in float32 that changes a lot, on a model held in ``dtype``."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(1)
    peft = get_peft_model(model.to(dtype), config)  # type: ignore[arg-type]
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            noise = torch.randn_like(parameter) * 0.2
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    return peft.eval()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 keeps its matrices transposed
def test_merged_weights_give_what_the_adapter_gives(settings: dict[str, Any], architecture: str) -> None:
    model = adapted(new_model(architecture), **settings)
    own = logits(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = new_model(architecture).eval()
    assert (logits(plain) - own).abs().max() > 0.5
    plain.load_state_dict(dict(merged_weights(model)), strict=False)
    torch.testing.assert_close(logits(plain), own, atol=2e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_merged_weights_are_those_of_peft(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """PEFT merges in the base's dtype here and there, so that in 16 bits a last place may differ."""
    model = adapted(llama(), dtype=dtype, **settings)
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    found = dict(merged_weights(model))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype == dtype
        torch.testing.assert_close(found[name], weight, atol=0, rtol=2 * torch.finfo(dtype).eps, msg=name)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_an_untied_embedding_or_head_is_merged_like_the_rest(
    settings: dict[str, Any], targets: list[str]
) -> None:
    model = adapted(llama(tie_word_embeddings=False), targets=targets, **settings)
    own = logits(model)
    plain = llama(tie_word_embeddings=False).eval()
    plain.load_state_dict(dict(merged_weights(model)))
    torch.testing.assert_close(logits(plain), own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_weights_that_serve_twice_are_refused(target: str) -> None:
    model = adapted(llama(tie_word_embeddings=True), targets=[target, "q_proj"])
    with pytest.raises(UserError, match=r"serve as embedding and as head: merging would change both"):
        dict(merged_weights(model))


def test_weights_are_rounded_once() -> None:
    """bfloat16 base, float32 adapter: each merged weight is the float32 sum, rounded."""
    model = adapted(llama(), dtype=torch.bfloat16, targets=LINEAR)
    layer = unwrapped(model).model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    exact = layer.base_layer.weight.float() + delta
    whole = merge_into_base(copy.deepcopy(model), dtype=torch.float16)
    weight = whole.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, exact.to(torch.float16))
    assert not torch.equal(weight, exact.to(torch.bfloat16).to(torch.float16))
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float16}
    assert not [name for name, _ in whole.named_parameters() if "lora" in name or "base_layer" in name]


def test_an_adapter_in_16_bits_is_added_in_float32() -> None:
    model = adapted(llama(), targets=LINEAR).bfloat16()
    layer = unwrapped(model).model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(merged_weight(layer), expected)


def test_what_is_held_in_another_dtype_than_the_rest_stays() -> None:
    model = llama().to(torch.bfloat16)  # type: ignore[arg-type]
    model.model.norm.float()
    whole = merge_into_base(adapted_as_it_is(model), dtype=torch.float16)
    assert whole.model.norm.weight.dtype == torch.float32
    assert whole.lm_head.weight.dtype == torch.float16


def adapted_as_it_is(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=LINEAR, task_type="CAUSAL_LM"))


def test_a_whole_replaced_module_is_refused() -> None:
    model = adapted(llama(), targets=LINEAR, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"the adapter replaces lm_head as a whole \(modules_to_save\)"):
        dict(merged_weights(model))


def test_an_adapter_with_a_bias_is_refused() -> None:
    model = adapted(llama(attention_bias=True), targets=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj has a bias of its own \(lora_bias\)"):
        dict(merged_weights(model))


def test_another_kind_of_adapter_is_refused() -> None:
    model = adapted(llama(), targets=LINEAR)
    layer = unwrapped(model).model.layers[1].mlp.down_proj
    layer.lora_variant["default"] = object()
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj is neither LoRA nor DoRA"):
        dict(merged_weights(model))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_never_merged_into(dtype: torch.dtype) -> None:
    model = adapted(llama(), targets=LINEAR)
    layer = unwrapped(model).model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(UserError, match=r"lies on quantised weights, which merging would ruin"):
        dict(merged_weights(model))
