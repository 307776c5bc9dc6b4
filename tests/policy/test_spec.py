"""What is known of a policy before its weights load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.types import UserError

CPU = torch.device("cpu")


def checked(policy: Path, lora: LoRAConfig | None = None) -> PolicySpec:
    spec = PolicySpec(PolicyConfig(str(policy), lora=lora))
    spec.check(compute_dtype=torch.bfloat16, device=CPU)
    return spec


def test_a_check_reads_what_needs_no_weights(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PolicySpec(PolicyConfig(str(tiny_policy)))
    with pytest.raises(AssertionError, match=r"check\(\) comes first"):
        _ = spec.tokenizer
    monkeypatch.setattr("sppo_lightning.policy.loading.load_policy", None)
    spec.check(compute_dtype=torch.bfloat16, device=CPU)
    assert spec.tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    assert spec.model_config.vocab_size == tiny_config().vocab_size
    assert (spec.compute_dtype, spec.device) == (torch.bfloat16, CPU)
    read = spec.tokenizer
    spec.check(compute_dtype=torch.float32, device=CPU)
    assert spec.tokenizer is read  # once, whatever the trainer
    assert spec.compute_dtype == torch.float32


def test_a_check_that_failed_is_made_again(tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config(vocab_size=9)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    spec = PolicySpec(PolicyConfig(str(tmp_path)))
    for _ in range(2):
        with pytest.raises(UserError, match="tokens, the model's embedding 9 rows"):
            spec.check(compute_dtype=torch.float32, device=CPU)


def test_a_policy_is_quantised_by_its_config_or_its_model(tiny_policy: Path) -> None:
    spec = checked(tiny_policy)
    assert not spec.quantized
    spec.model_config.quantization_config = {"quant_method": "gptq"}
    assert spec.quantized
    spec = checked(tiny_policy, LoRAConfig(rank=2, alpha=4))
    spec.config.quantization = "nf4"
    assert spec.quantized


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=4)], ids=["full", "lora"])
def test_the_meta_model_is_the_policy_without_its_weights(tiny_policy: Path, lora: LoRAConfig | None) -> None:
    spec = checked(tiny_policy, lora)

    def parameters(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, bool]]:
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]

    model = spec.meta_model()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert parameters(model) == parameters(load_policy(spec.config, compute_dtype=torch.bfloat16))
