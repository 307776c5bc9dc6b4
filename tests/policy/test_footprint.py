"""Bytes of weights against those of real models, quantised ones too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.models import tiny_config
from support.tiny import TRAINED_CONFIGS
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.footprint import (
    CannotEstimateError,
    footprint,
    loaded_footprint,
    quantized_matrix,
)
from sppo_lightning.policy.loading import meta_model
from sppo_lightning.policy.pretrained import quantization_options

KINDS: list[tuple[Literal["nf4", "int8"], bool]] = [("nf4", True), ("nf4", False), ("int8", True)]
LARGER = tiny_config(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=3, tie_word_embeddings=False
)


def held(model: nn.Module) -> int:
    """Bytes of the storages of a real model: weights, buffers, and what bitsandbytes keeps beside its matrices."""
    states: list[Any] = [model]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        states += [state, getattr(state, "state2", None)]
        if getattr(parameter, "SCB", None) is not None:
            tensors.append(parameter.SCB)  # type: ignore[attr-defined]
    states += [getattr(module, "state", None) for module in model.modules()]
    for state in states[1:]:
        tensors += [value for value in vars(state or nn.Module()).values() if isinstance(value, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for t in tensors if (s := t.untyped_storage()).nbytes()}.values())


def bare(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


@pytest.mark.parametrize("kind", TRAINED_CONFIGS)
def test_weights_are_counted_exactly(kind: str) -> None:
    config = TRAINED_CONFIGS[kind]
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    found = footprint(bare(config, torch.float32))
    assert found.weights == held(real)
    assert found.trained == 4 * found.trained_count
    assert found.widest == 0


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("config", [tiny_config(), LARGER, TRAINED_CONFIGS["gpt2"], TRAINED_CONFIGS["opt"]])
def test_quantised_weights_are_those_of_bitsandbytes(
    config: Any, kind: Literal["nf4", "int8"], double: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=quantization_options(kind, torch.bfloat16, double=double),
    )
    found = footprint(bare(config).requires_grad_(False), quantized_matrix(kind, double=double))
    assert found.weights == pytest.approx(held(real), rel=0.001)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": ["down_proj", "lm_head"],
        },
        {"load_in_8bit": True},
    ],
)
def test_weights_that_are_stored_quantised_stay_so(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the run's own quantisation says: transformers goes by the checkpoint."""
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    AutoModelForCausalLM.from_config(copy.deepcopy(LARGER)).save_pretrained(plain)
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)
    ).save_pretrained(stored)
    real = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(stored)
    found = loaded_footprint(bare(config), config, "none")
    assert found.weights == pytest.approx(held(real), rel=0.001)
    assert found == loaded_footprint(bare(config), config, "nf4")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_weights_in_a_form_that_is_not_known(method: str) -> None:
    config = tiny_config(quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        CannotEstimateError,
        match=f"the memory of a model with '{method}' weights cannot be estimated: only those of bitsandbytes",
    ):
        loaded_footprint(bare(config), config, "none")


def test_an_adapter_is_counted_apart_and_not_quantised() -> None:
    lora = LoRAConfig(rank=4, alpha=4)
    base = footprint(bare(LARGER).requires_grad_(False), quantized_matrix("nf4"))
    config = PolicyConfig("x", quantization="nf4", lora=lora)
    adapted = meta_model(config, LARGER, compute_dtype=torch.bfloat16)
    found = footprint(adapted, quantized_matrix("nf4"))
    assert found.frozen == base.frozen
    # rank 4 on all seven matrices of each layer, in and out
    widths = [(256, 256)] + 2 * [(256, 128)] + [(256, 256)] + 3 * [(256, 704)]
    assert found.trained_count == 3 * 4 * sum(map(sum, widths))
    assert found.trained == 4 * found.trained_count
    assert found.widest == 2 * 256 * 704


def test_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    config = tiny_config(num_labels=1)
    AutoModelForSequenceClassification.from_config(copy.deepcopy(config)).save_pretrained(tmp_path)
    real = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantization_options("nf4", torch.bfloat16)
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    assert footprint(model, quantized_matrix("nf4")).weights == pytest.approx(held(real), rel=0.001)
