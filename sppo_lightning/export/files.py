"""What an exported folder consists of: weights, tokenizer, generation config, and what llama.cpp's converter reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.pretrained import file_beside
from sppo_lightning.system.durable import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model with its tokenizer, chat template and generation config."""
    name_end_tokens(model, tokenizer)
    write_folder(model, tokenizer, folder)


def write_adapter(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    source: FinishedRun,
) -> None:
    """Write an adapter in PEFT's layout, with the tokenizer and generation config of its base.

    Args:
        base: the model that the adapter lies on.
        tokenizer: the policy's.
        folder: where to.
        source: the trained adapter.
    """
    shutil.copyfile(source.place / WEIGHTS, folder / WEIGHTS)
    settings = source.adapter_settings()
    location = Path(source.policy.pretrained)
    settings["base_model_name_or_path"] = str(location.resolve()) if location.exists() else str(location)
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = sorted(settings["target_modules"])
    write_atomically(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True).encode())
    tokenizer.save_pretrained(folder)
    name_end_tokens(base, tokenizer)
    cast(Any, base).generation_config.save_pretrained(folder)


def name_end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model's generation config name every token that ended a response in training."""
    generation = model.generation_config
    ends = policies.end_token_ids(model.config, tokenizer, generation)
    named = generation.eos_token_id
    if set(named if isinstance(named, list) else [named]) == ends:
        return
    generation.eos_token_id = sorted(ends) if len(ends) > 1 else min(ends)
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = (
            True  # some models name a temperature without it, which cannot be saved once changed
        )


def write_for_gguf(folder: Path, tokenizer: PreTrainedTokenizerBase, *, pretrained: str) -> None:
    """Complete a model folder for llama.cpp's ``convert_hf_to_gguf.py``, also for its older versions.

    They read the chat template in ``tokenizer_config.json`` only, the base of rotary positions under its old name, and
    the vocabulary of some models in ``tokenizer.model`` only.

    Args:
        folder: a whole model.
        tokenizer: the policy's.
        pretrained: the base, whose ``tokenizer.model`` comes along if it has one.
    """
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault(
                "rope_scaling", {name: value for name, value in rope.items() if name != "rope_theta"}
            )
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode())
    vocabulary = file_beside(pretrained, "tokenizer.model")
    if vocabulary is not None:
        shutil.copyfile(vocabulary, folder / "tokenizer.model")
