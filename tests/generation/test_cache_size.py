"""Bytes that are kept of what a model has read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.memory import ESTIMATOR, GEMMA4, workload
from support.tiny import CONFIGS, OTHER_CONFIGS, TRAINED_CONFIGS
from transformers import AutoModelForCausalLM, DynamicCache

from sppo_lightning.generation.cache import reserved_cache
from sppo_lightning.generation.cache_size import RowBytes, cache_bytes, held_bytes
from sppo_lightning.generation.steps import read
from sppo_lightning.memory.passes import PassMeter

ALL_CONFIGS = {**TRAINED_CONFIGS, **OTHER_CONFIGS, "gemma4_wide": GEMMA4}


def filled_cache(config: Any, tokens: int, rows: int = 1) -> DynamicCache:
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = reserved_cache(model.config)
    ids = torch.ones(rows, tokens, dtype=torch.long)
    with torch.no_grad():
        read(model, ids, ids, torch.arange(tokens).expand_as(ids), cache)
    return cache


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_a_token_by_hand(kind: str) -> None:
    """Keys and values of 2 layers, 2 heads of 8 numbers, 4 bytes each; half of it in 16 bits; within windows of 6."""
    assert cache_bytes(CONFIGS[kind], 5, torch.float32) == 5 * 2 * 2 * 2 * 8 * 4
    assert cache_bytes(CONFIGS[kind], 5, torch.bfloat16) == 5 * 2 * 2 * 2 * 8 * 2
    assert held_bytes(filled_cache(CONFIGS[kind], 5)) == 5 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("kind", ["llama", "mistral", "cohere2", "gemma3_capped", "gemma4_wide"])
def test_the_rule_counts_keys_and_values(kind: str) -> None:
    """Against a cache that was filled; windows of 6 keep one token less than they see."""
    cache = filled_cache(ALL_CONFIGS[kind], 20)
    truth = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    windowed = [layer for layer in cache.layers if type(layer).__name__ == "DynamicSlidingWindowLayer"]
    a_token = sum((layer.keys.nbytes + layer.values.nbytes) // 5 for layer in windowed)
    assert cache_bytes(ALL_CONFIGS[kind], 20, torch.float32) == truth + a_token


def test_states_by_hand() -> None:
    """Mamba 2: 2 layers; 4 heads of 16 by 8 numbers, and a convolution over 4 tokens of 64 + 2 * 8 channels."""
    for tokens in (1, 30):
        found = held_bytes(filled_cache(OTHER_CONFIGS["mamba2"], tokens, rows=3))
        assert found == 3 * 2 * 4 * (4 * 16 * 8 + 4 * 80)


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "mistral", "mamba2"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma4", "qwen3_5", "lfm2", "falcon_h1")),
    ],
)
def test_the_estimate_counts_what_a_model_keeps(kind: str) -> None:
    """States too, which no setting tells: run on tensors without data, against a cache that was filled."""
    load = workload(model_config=ALL_CONFIGS[kind], compute_dtype=torch.float32)
    passes = PassMeter().passes(load)
    assert passes.measured, passes.method
    assert passes.row == held_bytes(filled_cache(ALL_CONFIGS[kind], load.longest_row)) > 0


def test_latent_attention_is_bounded_by_no_rule() -> None:
    assert ESTIMATOR.at_most(workload(model_config=OTHER_CONFIGS["deepseek_v3"])) is None


def test_a_row_in_tokens() -> None:
    assert RowBytes(token=4, fixed=0).tokens(10) == 10
    assert RowBytes(token=4, fixed=9).tokens(10) == 13
