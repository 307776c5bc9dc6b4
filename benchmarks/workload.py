"""What the arms of ``train_step.py`` train on: the model, the pairs, the setting of one measurement."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""Llama models to make with random weights, by name; the head is not tied to the embeddings."""
DISTINCT_STEPS = 8  # batches that a run goes through again and again
BETA = 0.1
LEARNING_RATE = 5e-7


class Size(NamedTuple):
    """One cell of the grid."""

    prompt_tokens: int
    response_tokens: int
    pairs: int

    def options(self) -> list[str]:
        """Return the command line's words for it."""
        return [
            f"--prompt-tokens={self.prompt_tokens}",
            f"--response-tokens={self.response_tokens}",
            f"--pairs={self.pairs}",
        ]


class TokenPair(NamedTuple):
    """Token ids of a prompt and of both its responses."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the two sequences, each with its own prompt: what every arm is credited with."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def rounds(settings: argparse.Namespace) -> tuple[int, int]:
    """Return the palindromes to warm up with and to measure; each has two steps of every arm."""
    return -(-settings.warm_up // 2), -(-settings.steps // 2)


def total_steps(settings: argparse.Namespace) -> int:
    """Return the optimizer steps of one arm."""
    return 2 * sum(rounds(settings))


def token_pairs(settings: argparse.Namespace, vocabulary: int) -> list[TokenPair]:
    """Return the pairs of :data:`DISTINCT_STEPS` steps (fewer if the run is shorter), with random tokens.

    Args:
        settings: of the command line. Where ``ragged`` is set, lengths are log-normal (half of the limit in the
            median) and cut at the limit; otherwise they are the limit.
        vocabulary: token ids to draw from.
    """
    draw = random.Random(settings.seed)

    def sequence(limit: int) -> tuple[int, ...]:
        share = draw.lognormvariate(math.log(0.5), 0.6) if settings.ragged else 1.0
        return tuple(draw.choices(range(vocabulary), k=max(1, min(limit, round(limit * share)))))

    return [
        TokenPair(*map(sequence, (settings.prompt_tokens, *[settings.response_tokens] * 2)))
        for _ in range(settings.pairs * min(DISTINCT_STEPS, total_steps(settings)))
    ]


def training_order(settings: argparse.Namespace, pairs: int) -> list[int]:
    """Return the row numbers of all steps: those of so many pairs, over and over."""
    return [row % pairs for row in range(settings.pairs * total_steps(settings))]


def step_tokens(settings: argparse.Namespace, pairs: Sequence[TokenPair], step: int) -> int:
    """Return the tokens that a step is credited with."""
    order = training_order(settings, len(pairs))
    return sum(pairs[row].tokens for row in order[step * settings.pairs : (step + 1) * settings.pairs])


def compute_dtype(settings: argparse.Namespace) -> torch.dtype:
    """Return the dtype of the products."""
    return torch.bfloat16 if settings.precision == "bf16-mixed" else torch.float32


def model_config(settings: argparse.Namespace) -> Any:
    """Return the transformers config of the model under test."""
    from transformers import AutoConfig, LlamaConfig

    if settings.shape is None:
        return AutoConfig.from_pretrained(settings.model)
    changes = {} if settings.layers is None else {"num_hidden_layers": settings.layers}
    return LlamaConfig(
        **{**SHAPES[settings.shape], **changes},
        max_position_embeddings=1 << 17,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def write_shape(settings: argparse.Namespace, folder: Path) -> None:
    """Write the config of a model with random weights, and a tokenizer that only lends its special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model_config(settings).save_pretrained(folder)
    names = {name: number for number, name in enumerate(("<bos>", "<eos>", "<pad>"))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<pad>")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    ).save_pretrained(folder)


def random_model(settings: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Return the model of ``--shape``, with the same random weights in every process, on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return AutoModelForCausalLM.from_config(model_config(settings), dtype=dtype)


@torch.no_grad()
def same_adapter(model: torch.nn.Module, seed: int) -> None:
    """Give an adapter the same weights in every process: PEFT draws them from torch's own generator."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(values)


def as_json(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the record."""
    kept: dict[str, Any] = json.loads(json.dumps(vars(settings), default=str))
    return kept
