"""Tiny policies with and without an adapter that vLLM can serve: its attention on CPUs wants heads of 32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from support.models import tiny_config
from support.tiny import Source
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.loading import load_policy

RANK = 8
LIMIT = 192  # tokens of prompt and response together, of the servers here


def save_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a random model and return its folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(tiny_config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class ServedPolicy(Source):
    """A policy with an adapter, as a run hands it over."""

    model: PreTrainedModel | PeftModel

    def export(self, folder: Path) -> None:
        write_folder(self.model, self.tokenizer, folder)

    def train(self, seed: int, by: float = 0.1) -> None:
        """Move the adapter as an iteration does."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.add_(by * torch.randn_like(parameter))


def adapted(base: Path, *, rank: int = RANK, **changes: Any) -> ServedPolicy:
    """The base with a fresh adapter, which changes nothing yet."""
    config = PolicyConfig(str(base), dtype="float32", lora=LoRAConfig(rank=rank, alpha=2 * rank))
    model: Any = load_policy(config, compute_dtype=torch.float32)
    return ServedPolicy(model, **changes)


def plain(base: Path, **changes: Any) -> ServedPolicy:
    """The base itself."""
    model: Any = load_policy(PolicyConfig(str(base), dtype="float32"), compute_dtype=torch.float32)
    return ServedPolicy(model, **changes)
