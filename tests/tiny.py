"""Tiny models of several architectures, and a policy to sample from."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import byte_tokenizer, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

VOCABULARY = 259
END = 1
_LLAMA = tiny_config().to_dict()
_SHAPE: dict[str, Any] = {
    name: _LLAMA[name]
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
    )
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
CONFIGS = {
    "llama": tiny_config(),
    "qwen2": Qwen2Config(**_SHAPE),
    "mistral": MistralConfig(**_SHAPE, sliding_window=6),
    "gemma2": Gemma2Config(**_SHAPE, **_GEMMA),
    "gemma3": Gemma3TextConfig(**_SHAPE, **_GEMMA),
}


@functools.cache
def tiny_model(kind: str = "llama") -> PreTrainedModel:
    """A random model in eval mode; shared, so leave it as it is."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind])
    return model.eval().requires_grad_(False)


def random_tokens(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Sequences of byte tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths
    ]


@dataclass
class Source:
    """The policy that an engine samples from."""

    model: torch.nn.Module
    end_token_ids: frozenset[int] = frozenset({END})
    tokenizer: PreTrainedTokenizerBase = field(default_factory=byte_tokenizer)

    def sampling_model(self) -> torch.nn.Module:
        return self.model.eval()
