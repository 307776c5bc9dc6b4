"""Find, check and open pretrained models: HF folders, hub ids and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from sppo_lightning.policy.anatomy import embedding_rows
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 100_000),
    "num_labels": 1_000_000,
}
"""Counts in a model's config that are larger are an error: objects are made for each."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hub_location(pretrained: str) -> tuple[str, dict[str, str]]:
    """Split ``pretrained`` into what ``from_pretrained`` takes: folder or hub id, and GGUF arguments."""
    path = Path(pretrained)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return pretrained, {}


def load_model_config(
    pretrained: str, *, key: str, trust_remote_code: bool, expect: Literal["causal-lm", "reward", "any"]
) -> PretrainedConfig:
    """Read a model's configuration, without its weights.

    Raises:
        UserError: naming ``key``, if there is no model there.
    """
    from transformers import AutoConfig

    path = Path(pretrained)
    looks_local = path.is_absolute() or pretrained.startswith((".", "~")) or path.suffix == ".gguf"
    if not path.exists() and (looks_local or pretrained.count("/") > 1):
        raise UserError(f"{key}={pretrained!r}: no such model; give a model folder, a hub id or a .gguf file")
    if path.is_dir() and (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise _is_adapter(key, pretrained)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{key}={pretrained!r}: the folder has no config.json, so it holds no model")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{key}={pretrained!r} is a file but not .gguf: give the model's folder")
    location, extra = hub_location(pretrained)
    try:
        if not extra:
            _check_counts(location)
        config: PretrainedConfig = AutoConfig.from_pretrained(
            location, trust_remote_code=trust_remote_code, **extra
        )
        names = [str(name) for name in getattr(config, "architectures", None) or []]
        answers = class_of(config) is not None
    except Exception as error:
        if file_beside(pretrained, "adapter_config.json") and not file_beside(pretrained, "config.json"):
            raise _is_adapter(key, pretrained) from error
        raise UserError(
            f"{key}={pretrained!r} cannot be read as a model ({first_line(error)}): give a model "
            "folder, a hub id that can be reached or a .gguf file"
        ) from error
    if expect == "reward" and names and not any("SequenceClassification" in name for name in names):
        raise UserError(f"{key}={pretrained!r} is a {names[0]}, not a sequence-classification model")
    if expect == "causal-lm" and (any("SequenceClassification" in name for name in names) or not answers):
        kind = names[0] if names else f"{config.model_type!r} model"
        raise UserError(f"{key}={pretrained!r} is a {kind}, not a language model that can answer")
    return config


def _is_adapter(key: str, pretrained: str) -> UserError:
    own = "give its base model here"
    remedy = (
        f"{own}, and the adapter with model.policy.lora.adapter" if key == "model.policy.pretrained" else own
    )
    return UserError(f"{key}={pretrained!r} is an adapter: {remedy}")


def _check_counts(location: str) -> None:
    """Refuse counts that no model has, before as many objects are made one by one.

    Raises:
        ValueError: naming the setting.
    """
    from transformers import PretrainedConfig

    parts: list[Any] = [PretrainedConfig.get_config_dict(location)[0]]
    while parts:
        part = parts.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int) and value > LARGEST.get(name, value):
                raise ValueError(f"config.json says {name}={value}, which no model has")


def model_class(pretrained: str, *, key: str, trust_remote_code: bool) -> Any:
    """Return transformers' class to load a causal language model by, ``AutoModelForCausalLM`` for most.

    Raises:
        UserError: naming ``key``, if there is none.
    """
    from transformers import AutoModelForCausalLM

    if hub_location(pretrained)[1]:
        return AutoModelForCausalLM  # to read a .gguf file's config takes seconds
    return class_of(
        load_model_config(pretrained, key=key, trust_remote_code=trust_remote_code, expect="causal-lm")
    )


def class_of(model_config: PretrainedConfig) -> Any:
    """Return what :func:`model_class` does; ``None`` for a model that is known not to continue its prompt.

    A multimodal model without a class for text alone is loaded as what it is.

    Args:
        model_config: its settings.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    of_its_own: dict[str, str] = getattr(model_config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in of_its_own or type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    text_config: Any = model_config.get_text_config(decoder=True)
    translates = model_config.is_encoder_decoder or text_config.is_encoder_decoder
    if translates or type(model_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    return AutoModelForImageTextToText


def stored_dtype(model_config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype of a model's weights, as far as its settings, or those of its part for text, say it.

    Args:
        model_config: its settings.
    """
    for config in (model_config, model_config.get_text_config(decoder=True)):
        dtype: torch.dtype | None = getattr(config, "dtype", None)
        if dtype is not None:
            return dtype
    return None


def load_tokenizer(pretrained: str, *, key: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; a missing pad token becomes the end token.

    Raises:
        UserError: naming ``key``, if there is none.
    """
    from transformers import AutoTokenizer

    location, extra = hub_location(pretrained)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, trust_remote_code=trust_remote_code, **extra
        )
        tokenizer("a")
    except Exception as error:  # of any kind, by what stands in its files
        raise UserError(
            f"{key}={pretrained!r} has no tokenizer that can be read ({first_line(error)}): save the tokenizer "
            "beside the model"
        ) from error
    template = tokenizer.chat_template
    if not isinstance(template, str | dict | None):
        raise UserError(
            f"{key}={pretrained!r}: the tokenizer's chat template is no text but {template!r:.80}: save the tokenizer "
            "anew"
        )
    if extra and tokenizer.eos_token_id == tokenizer.bos_token_id:
        _special_tokens_of_gguf(tokenizer, location, extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def file_beside(pretrained: str, name: str, *, fetch: bool = True) -> str | None:
    """Return where a file lies that belongs to a model; ``None`` if there is none, or it cannot be reached.

    Args:
        pretrained: folder, hub id or ``.gguf`` file.
        name: of the file.
        fetch: from the hub, if it is not here.
    """
    from transformers.utils.hub import cached_file

    location, extra = hub_location(pretrained)
    if extra:
        return None
    try:
        found: str | None = cached_file(
            location, name, local_files_only=not fetch, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    return found


def fetch_processor(pretrained: str) -> None:
    """Have what a model's images and sounds are prepared by at hand for :func:`copy_processor`.

    Args:
        pretrained: folder or hub id of a multimodal model.
    """
    for name in PROCESSOR_FILES:
        file_beside(pretrained, name)


def copy_processor(pretrained: str, folder: Path) -> None:
    """Copy what a model's images and sounds are prepared by, as far as it is here.

    Args:
        pretrained: folder or hub id of a multimodal model.
        folder: where to.
    """
    for name in PROCESSOR_FILES:
        found = file_beside(pretrained, name, fetch=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


def check_quantization(kind: str, device: torch.device | None, *, key: str) -> None:
    """Refuse quantised weights where bitsandbytes cannot make them.

    Args:
        kind: of the weights; ``none`` is never refused.
        device: where they will be; ``None``: not known yet.
        key: of the config.

    Raises:
        UserError: naming ``key``, if bitsandbytes is not there or does not know the device.
    """
    if kind == "none":
        return
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"{key}={kind} needs bitsandbytes, which cannot be imported here ({first_line(error)}): pip install "
            "bitsandbytes, or set quantization: none"
        ) from error
    known: set[str] = bitsandbytes.supported_torch_devices
    if device is not None and device.type not in known:
        raise UserError(
            f"{key}={kind}: bitsandbytes does not know the device {device.type!r}, only {', '.join(sorted(known))}: "
            "choose another trainer.accelerator, or set quantization: none"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any, *, key: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        UserError: naming ``key``.
    """
    rows, ids = embedding_rows(model), max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise UserError(
            f"{key}: the tokenizer has {ids} tokens, the model's embedding {rows} rows: save the tokenizer that "
            "belongs to the model beside it, or the model with its embedding resized"
        )


def check_end_tokens(pretrained: str, model: Any, *, key: str) -> None:
    """Refuse end tokens that the model does not have, and a generation config that would be passed over.

    Args:
        pretrained: folder, hub id or ``.gguf`` file.
        model: of it, without weights perhaps.
        key: of the config.

    Raises:
        UserError: naming the file.
    """
    named = {"config.json": model.config.eos_token_id}
    path = file_beside(pretrained, "generation_config.json")
    if path is not None:
        try:
            content = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{key}={pretrained!r}: generation_config.json cannot be read ({first_line(error)}): fetch it again"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"{key}={pretrained!r}: generation_config.json is no JSON object: fetch it again")
        named["generation_config.json"] = content.get("eos_token_id")
    rows = embedding_rows(model)
    for file, found in named.items():
        for token_id in found if isinstance(found, list) else [] if found is None else [found]:
            if type(token_id) is not int or not 0 <= token_id < rows:
                raise UserError(
                    f"{key}={pretrained!r}: {file} names the end token {token_id!r}, but the model has the ids 0 to "
                    f"{rows - 1}: correct eos_token_id"
                )


def quantization_options(
    kind: Literal["nf4", "int8"], compute_dtype: torch.dtype, *, double: bool = True
) -> Any:
    """Return transformers' settings for bitsandbytes (QLoRA, arXiv 2305.14314, for ``nf4``).

    Args:
        kind: of the weights.
        compute_dtype: dtype of the products.
        double: quantise the scales of ``nf4`` too.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def forget_gguf(model: PreTrainedModel) -> None:
    """Drop the record that a model came from GGUF: its weights are plain tensors, and can be saved again."""
    cast(Any, model).hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _special_tokens_of_gguf(tokenizer: PreTrainedTokenizerBase, location: str, extra: dict[str, str]) -> None:
    """Name the special tokens that the file's metadata names; transformers 5.17 takes BOS for all."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location, **extra)
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
