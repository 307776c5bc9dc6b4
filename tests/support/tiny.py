"""Tiny models of several architectures, pairs to train them on, and a policy to sample from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BertConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Llama4TextConfig,
    Mamba2Config,
    Mistral3Config,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.policy.anatomy import embedding_rows
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.pretrained import class_of
from sppo_lightning.training.batching import PairBatch, StepSlot, collate
from sppo_lightning.types import PreferencePair, Ranks

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
_MIXED = ["sliding_attention", "full_attention"]
_SMALL = {name: _SHAPE[name] for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")}
TRAINED_CONFIGS = {
    **CONFIGS,
    # both kinds of layers, and a soft cap behind the head
    "gemma3_capped": Gemma3TextConfig(**_SHAPE, **_GEMMA, layer_types=_MIXED, final_logit_softcapping=5.0),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "granite": GraniteConfig(
        **_SHAPE, logits_scaling=4.0, attention_multiplier=0.3, embedding_multiplier=2.0
    ),
    "cohere": CohereConfig(**_SHAPE, logit_scale=0.3),
    "cohere2": Cohere2Config(**_SHAPE, logit_scale=0.3, sliding_window=6, layer_types=_MIXED),
    "gpt2": GPT2Config(
        **_SMALL, num_hidden_layers=2, num_attention_heads=4, n_positions=64, initializer_range=0.3
    ),
    "opt": OPTConfig(
        **_SMALL, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    # attention sinks, with and without a window
    "gpt_oss": GptOssConfig(
        **_SHAPE,
        head_dim=8,
        sliding_window=6,
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3_5": Qwen3_5TextConfig(
        **_SHAPE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "llama4": Llama4TextConfig(
        **_SHAPE, head_dim=8, attention_chunk_size=6, num_local_experts=2, intermediate_size_mlp=64
    ),
    "gemma4": Gemma4TextConfig(
        **_SHAPE,
        head_dim=8,
        global_head_dim=8,
        sliding_window=6,
        layer_types=_MIXED,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "lfm2": Lfm2Config(**_SHAPE, layer_types=["conv", "full_attention"]),
}


def kinds(*always: str) -> list[Any]:
    """Return parameters of a test for all models that are trained; only those in ``always`` are not slow.

    Args:
        always: one of each way to read a sequence: full and windowed attention, sinks, convolutions, experts.
    """
    assert set(always) <= set(TRAINED_CONFIGS)
    return [
        pytest.param(kind, marks=[] if kind in always else pytest.mark.slow, id=kind)
        for kind in sorted(TRAINED_CONFIGS)
    ]


_MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ENDS = {name: _SHAPE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
OTHER_CONFIGS = {
    # latent attention; attention beside a state in every layer; states alone; mixed with attention; positions counted
    "deepseek_v3": DeepseekV3Config(
        **{**_SHAPE, "num_key_value_heads": 4},
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
    ),
    "falcon_h1": FalconH1Config(**_SHAPE, **_MAMBA, mamba_d_ssm=64),
    "mamba2": Mamba2Config(
        **_SMALL, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    ),
    "granite_hybrid": GraniteMoeHybridConfig(
        **_SHAPE, **_MAMBA, layer_types=["mamba", "attention"], shared_intermediate_size=64
    ),
    "bart": BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.3,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
    # with eyes; transformers has a class for causal language models for the first two only
    "gemma3_seeing": Gemma3Config(
        text_config={**_SHAPE, **_GEMMA, "layer_types": _MIXED},
        vision_config=_EYES,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        **_ENDS,
    ),
    "gemma4_seeing": Gemma4Config(
        text_config={
            **_SHAPE,
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 6,
            "layer_types": _MIXED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        vision_config={**_EYES, "num_key_value_heads": 2, "head_dim": 8},
        audio_config=None,
        **_ENDS,
    ),
    "mistral3_seeing": Mistral3Config(
        text_config={**_SHAPE, "model_type": "mistral", "head_dim": 8},
        vision_config={**_EYES, "model_type": "pixtral"},
        **_ENDS,
    ),
    "bert": BertConfig(
        **_SMALL, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3
    ),
}


@functools.cache
def tiny_model(kind: str = "llama") -> PreTrainedModel:
    """A random model in eval mode; shared, so leave it as it is."""
    return new_model(kind).eval().requires_grad_(False)


def new_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model to train, the same at every call."""
    torch.manual_seed(0)
    config = copy.deepcopy({**TRAINED_CONFIGS, **OTHER_CONFIGS}[kind])
    model: PreTrainedModel = class_of(config).from_config(config)
    return model.to(dtype)  # type: ignore[arg-type]


def random_tokens(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Sequences of byte tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths
    ]


LENGTHS = [(5, 3, 1), (1, 6, 2), (9, 1, 4), (2, 2, 9), (7, 5, 5)]  # prompt, chosen, rejected


def pairs_of(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[PreferencePair]:
    """Pairs of random tokens."""
    pairs = []
    for number, length in enumerate(lengths):
        prompt, chosen, rejected = random_tokens(*length, seed=number)
        pairs.append(PreferencePair(f"p{number}", prompt, chosen, rejected, "c", "r", 1.0, 0.0))
    return pairs


def batch_of(pairs: Sequence[PreferencePair], layout: PairLayout) -> PairBatch:
    """All pairs as one micro-batch, which is a whole step."""
    slot = StepSlot(step=0, steps=1, step_pairs=len(pairs), first_in_step=True, last_in_step=True)
    return collate(pairs, layout=layout, real=len(pairs), slot=slot)


def alone(model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """Log-prob of each response token, ``[N]``, chosen responses first.

    Each sequence is read by itself, without padding, positions or mask, through all logits of the model's own.
    """

    def logps(prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        all_logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        return all_logps[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]

    chosen = [logps(pair.prompt_token_ids, pair.chosen_token_ids) for pair in pairs]
    rejected = [logps(pair.prompt_token_ids, pair.rejected_token_ids) for pair in pairs]
    return torch.cat([*chosen, *rejected])


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum in which each token has a weight of its own, some of them negative."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps)).to(logps)).sum().backward()
    found = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return found


def close_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-5
) -> None:
    """To ``tolerance`` of each parameter's largest gradient."""
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        atol = tolerance * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=name)


@dataclass
class Source:
    """The policy that an engine samples from."""

    model: torch.nn.Module
    end_token_ids: frozenset[int] = frozenset({END})
    tokenizer: PreTrainedTokenizerBase = field(default_factory=byte_tokenizer)
    quantized: bool = False

    @property
    def embedding_rows(self) -> int:
        return embedding_rows(self.model)

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        pass

    def sampling_model(self) -> torch.nn.Module:
        return self.model.eval()

    def resident_model(self) -> torch.nn.Module | None:
        return self.model.eval()

    def fingerprint(self) -> str:
        return fingerprint(self.model, "tiny")
