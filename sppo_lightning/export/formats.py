"""The formats that come with the package, a class each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sppo_lightning.export.card import model_name
from sppo_lightning.export.exporter import Exporter
from sppo_lightning.export.finished_run import ADAPTER_CONFIG, FinishedRun
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.folder import base_arguments, loads_with_auto_peft, write_folder
from sppo_lightning.policy.pretrained import file_beside
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
HERE = "path/to/this/folder"
VLLM_RANK = 16  # the highest that vLLM takes without --max-lora-rank


class HFModel(Exporter):
    """The full model of a run without lora, for transformers, vLLM, SGLang."""

    name = "hf"
    holds = "the full model"

    def validate(self, run: FinishedRun, *, dtype: torch.dtype | None) -> None:
        """Refuse an adapter."""
        if run.has_adapter:
            raise UserError(
                f"{run.folder.root} trained an adapter (model.policy.lora), so that there is no full model: use "
                "--format adapter for the adapter alone, or --format merged for base and adapter in one"
            )

    def write(self, policy: SavedPolicy, folder: Path) -> None:
        """Write model, tokenizer, chat template and generation config."""
        _write_full_model(policy, folder)

    def read_back(self, policy: SavedPolicy, folder: Path) -> nn.Module:
        """Load the model."""
        return policy.load_model(folder)

    def how_to_load(self, policy: SavedPolicy) -> Iterator[str]:
        """By transformers."""
        yield _by_transformers(policy)


class MergedModel(Exporter):
    """The adapter merged into its base, read again without quantisation, as one full model."""

    name = "merged"
    holds = "base and adapter merged into a full model"

    def validate(self, run: FinishedRun, *, dtype: torch.dtype | None) -> None:
        """Refuse a run without an adapter."""
        _require_adapter(run)

    def write(self, policy: SavedPolicy, folder: Path) -> None:
        """Write model, tokenizer, chat template and generation config."""
        _write_full_model(policy, folder)

    def read_back(self, policy: SavedPolicy, folder: Path) -> nn.Module:
        """Load the model."""
        return policy.load_model(folder)

    def how_to_load(self, policy: SavedPolicy) -> Iterator[str]:
        """By transformers."""
        yield _by_transformers(policy)


class GGUFReadyModel(Exporter):
    """A full model, merged where there is an adapter, for llama.cpp's ``convert_hf_to_gguf.py``, also older versions.

    They read the chat template in ``tokenizer_config.json`` only, the base of rotary positions under its old name, and
    the vocabulary of some models in ``tokenizer.model`` only.
    """

    name = "gguf-ready"
    holds = "a full model, ready for llama.cpp's `convert_hf_to_gguf.py`"

    def write(self, policy: SavedPolicy, folder: Path) -> None:
        """Write the model, and what the converter looks for."""
        _write_full_model(policy, folder)
        policy.tokenizer.save_pretrained(folder, save_jinja_files=False)
        path = folder / "config.json"
        config: dict[str, Any] = json.loads(path.read_bytes())
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
                config.setdefault("rope_scaling", scaling)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode())
        vocabulary = file_beside(policy.run.policy_config.pretrained, "tokenizer.model")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, folder / "tokenizer.model")

    def read_back(self, policy: SavedPolicy, folder: Path) -> nn.Module:
        """Load the model."""
        return policy.load_model(folder)

    def how_to_load(self, policy: SavedPolicy) -> Iterator[str]:
        """By the converter, and by transformers."""
        yield "With llama.cpp's converter:"
        yield f"```sh\npython convert_hf_to_gguf.py {HERE} --outtype bf16 --outfile model.gguf\n```"
        yield "It is a Hugging Face folder like any other, too:"
        yield _by_transformers(policy)


class PEFTAdapter(Exporter):
    """The adapter alone in PEFT's layout, with the tokenizer and generation config of its base."""

    name = "adapter"
    holds = "a LoRA adapter in PEFT's layout, without its base"
    library = "peft"

    def validate(self, run: FinishedRun, *, dtype: torch.dtype | None) -> None:
        """Refuse a run without an adapter, and another dtype than its own."""
        _require_adapter(run)
        if dtype not in (None, torch.float32):
            raise UserError(
                f"--dtype {str(dtype).removeprefix('torch.')} is for full models: an adapter stays float32, as it was "
                "trained; leave it out"
            )

    def write(self, policy: SavedPolicy, folder: Path) -> None:
        """Write the adapter with its base's location, absolute where that is a folder."""
        run = policy.run
        shutil.copyfile(run.policy_folder / WEIGHTS, folder / WEIGHTS)
        settings = run.adapter_settings()
        location = Path(run.policy_config.pretrained)
        settings["base_model_name_or_path"] = str(location.resolve() if location.exists() else location)
        if isinstance(settings["target_modules"], list):
            settings["target_modules"] = sorted(settings["target_modules"])
        write_atomically(folder / ADAPTER_CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
        policy.tokenizer.save_pretrained(folder)
        base = unwrapped(policy.load())
        name_end_tokens(base, policy.tokenizer)
        base.generation_config.save_pretrained(folder)

    def read_back(self, policy: SavedPolicy, folder: Path) -> nn.Module:
        """Load adapter and base as PEFT does by the folder's name alone, where it can."""
        from peft import AutoPeftModelForCausalLM

        if not loads_with_auto_peft(policy.run.policy_config.pretrained, policy.loader.__name__):
            return policy.load_adapter(folder)
        return cast(
            nn.Module,
            AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=policy.trust_remote_code),
        )

    def how_to_load(self, policy: SavedPolicy) -> Iterator[str]:
        """By PEFT, and by vLLM."""
        base, loader = policy.run.policy_config.pretrained, policy.loader.__name__
        if loads_with_auto_peft(base, loader):
            yield _python(
                "from peft import AutoPeftModelForCausalLM",
                "from transformers import AutoTokenizer",
                f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")',
            )
            if Path(base).exists():
                yield (
                    f"The base, {model_name(base)}, was a folder where this was written: where it lies elsewhere, "
                    "correct `base_model_name_or_path` in `adapter_config.json`."
                )
        else:
            local = Path(base).exists() or base.endswith(".gguf")
            shown = f"path/to/its/folder/{model_name(base)}" if local else base
            yield f"PEFT cannot open {model_name(base)}, the base, by itself:"
            yield _python(
                "from peft import PeftModel",
                f"from transformers import {loader}, AutoTokenizer",
                f"base = {loader}.from_pretrained({base_arguments(shown)})",
                f'model = PeftModel.from_pretrained(base, "{HERE}")',
            )
        quantization, settings = policy.run.policy_config.quantization, policy.run.adapter_settings()
        if quantization != "none":
            yield (
                f"The adapter was trained on its base in {quantization}; on the base without quantisation it gives "
                "nearly the same policy (see below)."
            )
        if settings["use_dora"]:
            yield (
                "This is a DoRA adapter. vLLM serves none, and `AutoModelForCausalLM.from_pretrained` of transformers "
                "5 leaves its magnitudes out: load it with PEFT as above, or export `--format merged`."
            )
        elif settings["r"] > VLLM_RANK:
            yield f"vLLM serves it with `--enable-lora --max-lora-rank {settings['r']}` or more."
        else:
            yield "vLLM serves it with `--enable-lora`."


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
    except ValueError:  # some models name a temperature without it, which cannot be saved once changed
        generation.do_sample = True


def _require_adapter(run: FinishedRun) -> None:
    if not run.has_adapter:
        raise UserError(
            f"{run.folder.root} trained all weights (no model.policy.lora), so that there is no adapter: use "
            "--format hf"
        )


def _write_full_model(policy: SavedPolicy, folder: Path) -> None:
    model = policy.load_full()
    name_end_tokens(model, policy.tokenizer)
    write_folder(model, policy.tokenizer, folder)


def _by_transformers(policy: SavedPolicy) -> str:
    loader = policy.loader.__name__
    return _python(
        f"from transformers import {loader}, AutoTokenizer",
        f'model = {loader}.from_pretrained("{HERE}")',
    )


def _python(*lines: str) -> str:
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")'
    return "\n".join(["```python", *lines, tokenizer, "```"])
