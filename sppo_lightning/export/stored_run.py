"""A run folder as it is found: its settings, and what they say of its prompts' tokenizer; no policy has to be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.pretrained import load_tokenizer
from sppo_lightning.prompts.chat_template import choose_chat_template, set_template_clock
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.run_settings import read_settings, reading_settings
from sppo_lightning.training.precision import COMPUTE_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class StoredRun:
    """A run and its settings.

    Args:
        folder: of the run.
        config: the run's settings, as its ``config.yaml`` has them.
        policy_config: those of the policy, as they were given.
    """

    folder: RunFolder
    config: Mapping[str, Any]
    policy_config: PolicyConfig

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the products in training."""
        return compute_dtype(self.config)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer with the chat template that the run's prompts got, and set its clock.

        Raises:
            UserError: if it is not there any more.
        """
        policy, key = self.policy_config, "model.policy"
        if policy.template_date is not None:
            set_template_clock(date.fromisoformat(policy.template_date))
        if self.folder.policy.is_dir():
            return load_tokenizer(
                str(self.folder.policy), key="the run's policy", trust_remote_code=policy.trust_remote_code
            )
        tokenizer = load_tokenizer(
            policy.pretrained, key=f"{key}.pretrained", trust_remote_code=policy.trust_remote_code
        )
        choose_chat_template(tokenizer, policy.chat_template, key=f"{key}.chat_template")
        return tokenizer


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the products in training; ``config``: of a run."""
    precision = str(config["trainer"].get("precision"))
    return COMPUTE_DTYPES[PRECISIONS.get(precision, precision)]


def read_run(root: Path) -> StoredRun:
    """Read a run's settings.

    Args:
        root: the run's folder.

    Raises:
        UserError: if this is no run.
    """
    folder = RunFolder(root)
    config = read_settings(folder)
    with reading_settings(folder):
        settings = dict(config["model"]["policy"])
        if settings.get("lora") is not None:
            settings["lora"] = LoRAConfig(**settings["lora"])
        policy = PolicyConfig(**settings)
        compute_dtype(config)
    return StoredRun(folder, config, policy)
