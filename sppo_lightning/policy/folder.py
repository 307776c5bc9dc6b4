"""A policy's folder in Hugging Face's layout; an adapter's in PEFT's, with a README."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sppo_lightning.policy.anatomy import beside_text, text_settings, unwrapped
from sppo_lightning.policy.pretrained import (
    class_of,
    copy_processor,
)
from sppo_lightning.system.durable import make_readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def adapter_readme(model: nn.Module, loader: str) -> str:
    """Return the ``README.md`` of a model's adapter in PEFT's layout: its base, and how to load the two.

    Args:
        model: PEFT's.
        loader: name of transformers' class to load the base by.
    """
    config = cast(Any, model).peft_config["default"]
    base = str(config.base_model_name_or_path)
    lines = [
        f"# A {'DoRA' if config.use_dora else 'LoRA'} adapter",
        f"Written by sppo-lightning while training. Its base is `{base}`, which it is loaded with by PEFT:",
        f"```python\n{_loading(base, loader)}\n```",
    ]
    if config.use_dora:
        lines.append(
            "`AutoModelForCausalLM.from_pretrained` of transformers 5 leaves out the magnitudes of a DoRA adapter "
            "without a word, and gives another model: load it as above."
        )
    lines.append(
        "`sppo-lightning export` writes the policy into a folder for others, checked, with a full model card."
    )
    return "\n\n".join(lines) + "\n"


def loads_with_auto_peft(base: str, loader: str) -> bool:
    """Whether PEFT finds and loads an adapter's base by itself: no ``.gguf`` file, no multimodal model.

    Args:
        base: where it is.
        loader: name of transformers' class to load it by.
    """
    return loader == "AutoModelForCausalLM" and not base.endswith(".gguf")


def _loading(base: str, loader: str) -> str:
    if loads_with_auto_peft(base, loader):
        return (
            "from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")'
        )
    return (
        f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
        f"base = {loader}.from_pretrained({base_arguments(base)})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
    )


def base_arguments(base: str) -> str:
    """Return what ``from_pretrained`` is called with to load an adapter's base, as Python text."""
    place = Path(base)
    return f'"{place.parent}", gguf_file="{place.name}"' if base.endswith(".gguf") else f'"{base}"'


def write_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (an adapter in PEFT's layout and a README), tokenizer, chat template and generation config.

    A multimodal model's processor, which prepares images and sounds, is copied.
    """
    inner, settings = unwrapped(model), text_settings(model)
    use_cache, settings.use_cache = settings.use_cache, True
    # transformers 5.23 writes on the first process only, whichever is asked to
    inner.should_save_on_this_rank = _always
    try:
        cast(Any, model).save_pretrained(folder, safe_serialization=True)
    finally:
        settings.use_cache = use_cache
        del inner.should_save_on_this_rank
    if hasattr(model, "peft_config"):  # PEFT leaves out the generation config, and writes a form to fill in
        unwrapped(model).generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(adapter_readme(model, loader_name(inner)))
    elif beside_text(model):
        copy_processor(inner.name_or_path, folder)
    tokenizer.save_pretrained(folder)
    make_readable(folder)


def loader_name(model: PreTrainedModel) -> str:
    """Return the name of transformers' class that a model was loaded by."""
    found = class_of(model.config)  # none knows the settings that a part of Llama 3.2 Vision has of its own
    return "AutoModelForCausalLM" if found is None else str(found.__name__)


def _always(is_main_process: bool) -> bool:
    return True
