"""Workloads to estimate, and what a step really takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.models import tiny_config
from support.tiny import TRAINED_CONFIGS
from torch import nn
from transformers import (
    Gemma4TextConfig,
)

from sppo_lightning.generation import (
    HFGenerator,
)
from sppo_lightning.losses import DPOLoss, PairLogps
from sppo_lightning.memory.dry_run import LiveBytes
from sppo_lightning.memory.estimate import (
    GIB,
    Estimator,
)
from sppo_lightning.memory.workload import PairShape, PromptLengths, TrainingSettings, Workload
from sppo_lightning.pair_forward import AutoForward, PairForward
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.rewards import (
    Reward,
)
from sppo_lightning.training.hardware import Hardware
from sppo_lightning.types import Prompt

CONFIG = tiny_config(
    vocab_size=1000, hidden_size=64, intermediate_size=176, num_hidden_layers=3, tie_word_embeddings=False
)


SAMPLING: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0}


class Plain(Reward):
    """A reward of a user's own that says nothing of its memory."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)


def workload(**changes: Any) -> Workload:
    """A run of a tiny model, with fields of it or of its records changed."""
    settings: dict[str, Any] = {
        "policy": PolicyConfig("x"),
        "model_config": CONFIG,
        "pair_forward": AutoForward(),
        "reference": "previous_iteration",
        "optimizer": None,
        "carry_optimizer": False,
        "clips_gradients": False,
        "pairs_per_step": 3,
        "batch_size": 3,
        "generator": HFGenerator(**SAMPLING),
        "reward": Plain(),
        "answered": 40,
        "trained": changes.get("answered", 40),
        "device": torch.device("cpu"),
        "processes": 1,
        "sharded": False,
        "compute_dtype": torch.bfloat16,
        **changes,
    }
    records: dict[str, Any] = {"training": TrainingSettings, "prompts": PromptLengths, "hardware": Hardware}
    for name, record in records.items():
        settings[name] = record(*(settings.pop(field) for field in record._fields))
    return Workload(**settings)


ESTIMATOR = Estimator(GIB)


_TINY = TRAINED_CONFIGS["gemma4"].to_dict()


_SIZES = {name: _TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}


_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}


# layers of several sizes: wider heads in the second one, and an inner width for each
GEMMA4 = Gemma4TextConfig(
    **_SIZES,
    **_HEADS,
    **_MIXED,
    intermediate_size=64,
    global_head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=_SIZES["vocab_size"],
)


def step(model: nn.Module, forward: PairForward, shape: PairShape, dtype: torch.dtype) -> None:
    prompt, response = [5] * shape.prompt, [7] * shape.response
    rows = forward.layout(0).rows(*([tokens] * shape.pairs for tokens in (prompt, response, response)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logps = forward.logps(model, rows)
    reference = PairLogps(*(torch.zeros_like(side) for side in logps))
    DPOLoss(beta=0.1)(logps, reference).loss.sum().backward()


def peak_of(model: nn.Module, run: Any) -> int:
    live = LiveBytes()
    weights = live.count([*model.parameters(), *model.buffers()])
    with live:
        run()
    return int(live.peak - weights)
