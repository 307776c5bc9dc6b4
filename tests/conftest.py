"""Tiny real models and a byte-level tokenizer, made on the spot: no network, no downloads."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning.pytorch  # noqa: F401  before any test: its log handler keeps the standard error that it finds
import pytest
import torch
from support.crash import CrashError
from support.models import byte_tokenizer, tiny_config
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

# a shell's background job ignores Ctrl-C, and so would each process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(
    1
)  # threads that wait for each other on a busy machine make tiny models 20 times slower


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Put back what our loggers say and where: the commands set it for their process, here for all tests after them."""
    logger = logging.getLogger("sppo_lightning")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers  # one of a test writes to a stream that is closed after it


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
