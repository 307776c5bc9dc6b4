"""Tiny real models and a byte-level tokenizer, made on the spot: no network, no downloads."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

# a shell's background job ignores Ctrl-C, and so would each process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(
    1
)  # threads that wait for each other on a busy machine make tiny models 20 times slower

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<pad>"]


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, after three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**settings, **changes})


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with random weights and the byte tokenizer, as a HF folder."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer one-logit Llama with random weights and its own chat template, as a HF folder."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class CrashError(Exception):
    """The machine went down."""


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the next write die before its bytes are known to be on disk."""

    def fail(descriptor: int) -> None:
        raise CrashError

    return lambda: monkeypatch.setattr(os, "fsync", fail)


@pytest.fixture(scope="session")
def counting_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train.jsonl``, 14 prompts, and ``eval.jsonl``, 6 others."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, start, count in (("train", 0, 14), ("eval", 50, 6)):
        records = [
            {"id": f"{name}{n}", "prompt": f"Count to {start + n}", "answer": f"{n}ab"} for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


WORDS = ["river", "stone", "cloud", "amber", "violet", "copper", "meadow", "falcon", "harbor", "lantern"]


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[..., Path]:
    """Write ``count`` prompt records as jsonl and return the file."""

    def write(name: str = "prompts.jsonl", count: int = 12, start: int = 0) -> Path:
        path = tmp_path / name
        records = [
            {
                "id": f"p{number}",
                "prompt": f"Say {WORDS[number % 10]} {number} times" + " please" * (number % 4),
                "answer": WORDS[number % 10],
            }
            for number in range(start, start + count)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def letter_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A reward that varies with the text, for tests: share of lower-case letters, less a length term."""
    return [
        sum(character.islower() for character in response) / (len(response) + 1) - 0.001 * len(response)
        for response in responses
    ]


def cli_arguments(policy: Path, prompts: Path, root: Path, **changes: Any) -> list[str]:
    """Arguments of a run that a laptop finishes in seconds."""
    settings: dict[str, Any] = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.default_root_dir": root,
        "trainer.logger": "false",
        "model.policy.pretrained": policy,
        "model.reference": "previous_iteration",
        "model.loss": "sppo_lightning.losses.DPOLoss",
        "model.loss.beta": 0.1,
        "model.learning_rate": 1e-3,
        "data.prompts": prompts,
        "data.iterations": 2,
        "data.samples_per_prompt": 3,
        "data.probe_samples": 2,
        "data.selection": "sppo_lightning.selection.Easiest",
        "data.selection.fraction": 0.75,
        "data.generator": "sppo_lightning.generation.HFGenerator",
        "data.generator.max_new_tokens": 8,
        "data.generator.temperature": 1.0,
        "data.reward": "sppo_lightning.rewards.FunctionReward",
        "data.reward.function": "conftest.letter_reward",
        "data.pairs_per_step": 4,
        "data.batch_size": 2,
        "data.prompts_per_shard": 5,
    }
    merged = {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in merged.items() if value is not None]
