"""Load a policy, copy it for sampling, and fingerprint it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning.policy.anatomy import freeze_non_text_modules, non_text_modules, text_settings
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.lora import with_adapter
from sppo_lightning.policy.pretrained import (
    DTYPES,
    class_of,
    fetch_processor,
    forget_gguf,
    hub_location,
    model_class,
    quantization_options,
)
from sppo_lightning.policy.quantized_layers import make_batch_invariant
from sppo_lightning.policy.weights import read_model
from sppo_lightning.prompts.chat_template import turn_end
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CPU = torch.device("cpu")
KEY = "model.policy.pretrained"


def load_base_model(
    config: PolicyConfig, *, compute_dtype: torch.dtype, device: torch.device = CPU
) -> PreTrainedModel:
    """Load the causal language model without an adapter.

    Args:
        config: what to load.
        compute_dtype: dtype of the trainer's matrix products; the frozen base of an adapter is held in it.
        device: where to.

    Raises:
        UserError: if there is none.
    """
    location, extra = hub_location(config.pretrained)
    loader = model_class(config.pretrained, key=KEY, trust_remote_code=config.trust_remote_code)
    options = {**extra, **_options(config, compute_dtype)}
    if device.type != "cpu" or config.quantization != "none":
        options["device_map"] = {"": device}  # 4-bit weights are made where they stay
    if config.quantization != "none":
        options["quantization_config"] = quantization_options(
            config.quantization, compute_dtype, double=config.double_quantization
        )
    model = read_model(loader, location, given=f"{KEY}={config.pretrained!r}", **options)
    if "gguf_file" in extra:
        forget_gguf(model)
    if non_text_modules(model):
        fetch_processor(location)
    keep_head_input_contiguous(model)
    make_batch_invariant(model)
    return model


def _options(config: PolicyConfig, compute_dtype: torch.dtype) -> dict[str, Any]:
    default = torch.float32 if config.lora is None else compute_dtype
    options: dict[str, Any] = {
        "dtype": DTYPES.get(config.dtype, default),
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def keep_head_input_contiguous(model: PreTrainedModel) -> None:
    """Keep a frozen head from being copied once per sequence.

    ``logits_to_keep`` hands the head a strided slice; torch (2.13) then multiplies in batches, with the weight
    copied for each sequence, unless the weight requires a gradient.
    """
    model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)


def _contiguous_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


def load_policy(config: PolicyConfig, *, compute_dtype: torch.dtype, device: torch.device = CPU) -> nn.Module:
    """Load the policy to train: all weights trainable, or an adapter on a frozen base.

    Args:
        config: what to load.
        compute_dtype: dtype of the trainer's matrix products.
        device: where to.

    Raises:
        UserError: if the adapter does not fit.
    """
    return _trainable(load_base_model(config, compute_dtype=compute_dtype, device=device), config)


def meta_model(
    config: PolicyConfig, model_config: PretrainedConfig, *, compute_dtype: torch.dtype
) -> nn.Module:
    """Return the policy to train without its weights: on the meta device, and not quantised.

    Args:
        config: what :func:`load_policy` would load.
        model_config: the model's own settings.
        compute_dtype: dtype of the trainer's matrix products.

    Raises:
        UserError: if attention kernel or adapter do not fit the model.
    """
    with torch.device("meta"):
        try:
            model: PreTrainedModel = class_of(model_config).from_config(
                copy.deepcopy(model_config), **_options(config, compute_dtype)
            )
        except Exception as error:
            if config.attn_implementation is not None and isinstance(error, ImportError | ValueError):
                raise UserError(
                    f"model.policy.attn_implementation={config.attn_implementation} does not serve this model here "
                    f"({first_line(error)}): leave it out"
                ) from error
            raise UserError(
                f"{KEY}={config.pretrained!r}: no model can be made as its config says "
                f"({type(error).__name__}: {first_line(error)}): fetch the folder again"
            ) from error
        return _trainable(model, config)


def _trainable(model: PreTrainedModel, config: PolicyConfig) -> nn.Module:
    text_settings(model).use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained: nn.Module = model
    if config.lora is not None:
        trained = with_adapter(model, config.lora, pretrained=config.pretrained)
    freeze_non_text_modules(trained)
    return trained


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off, except an adapter's own: policy and reference must see the same network.

    Dropout is a module in some architectures, a number in a module or in the config in others.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        _zero_dropout_rates(module)
    _zero_dropout_rates(cast(Any, model).config)


def _zero_dropout_rates(holder: object) -> None:
    rates = [name for name, value in vars(holder).items() if isinstance(value, float) and "drop" in name]
    for name in rates:
        setattr(holder, name, 0.0)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Hold a model in training mode, an adapter's dropout switched off, while the context lasts.

    Training mode, since 8-bit layers of bitsandbytes compute differently in eval mode.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.train()


def end_token_ids(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, generation: Any
) -> set[int]:
    """Return every token id that ends a response.

    The generation config, the model's config, the tokenizer and its chat template each may know one that the others do
    not: all of them count. A response that ran through its end would be cut by its length only.
    """
    found: set[int] = set()
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(model_config, "eos_token_id", None),
        tokenizer.eos_token_id,
        turn_end(tokenizer),
    ):
        found |= set() if value is None else set(value) if isinstance(value, list) else {value}
    if not found:
        raise UserError(
            "the policy names no end-of-sequence token: set eos_token_id in its generation config"
        )
    return found


def sampling_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy in ``dtype`` that shares nothing with ``model`` and is in eval mode.

    Parameters are converted one by one, so that no second full-precision copy ever exists.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo).eval()
