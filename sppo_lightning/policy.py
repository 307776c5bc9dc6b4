"""Load a policy, copy it for sampling, and fingerprint it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from sppo_lightning.pretrained import (
    DTYPES,
    forget_gguf,
    hub_location,
    quantization_options,
)
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685) through PEFT; the adapter trains in float32.

    Args:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on the adapter's input while training; off for log-prob passes of the reference.
        target_modules: names of the layers to adapt; ``all-linear`` or a list.
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class PolicyConfig:
    """Which model to train and how to hold it.

    Args:
        pretrained: a HF folder, a hub id, or a ``.gguf`` file.
        dtype: dtype of the weights. ``auto``: float32 for full fine-tuning (updates of 1e-7 vanish in
            bfloat16), the trainer's compute dtype for the frozen base of an adapter.
        attn_implementation: attention kernel, as in transformers; ``None`` leaves the choice to it. A training forward
            that shares prompts brings its own (``model.pair_forward``).
        quantization: 4-bit NF4 or 8-bit weights through bitsandbytes, for the frozen base of an adapter.
        lora: train a low-rank adapter instead of all weights.
        gradient_checkpointing: recompute activations in the backward pass.
        trust_remote_code: run code that comes with the model.
    """

    pretrained: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["none", "nf4", "int8"] = "none"
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.quantization != "none" and self.lora is None:
            raise UserError(
                f"model.policy.quantization={self.quantization} freezes the weights, so that there is nothing "
                "to train: set model.policy.lora too, or quantization: none"
            )
        if self.lora is not None and self.lora.rank < 1:
            raise UserError(f"model.policy.lora.rank={self.lora.rank} must be at least 1")


def load_base_model(config: PolicyConfig, *, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model without an adapter.

    Args:
        config: what to load.
        compute_dtype: dtype of the trainer's matrix products; the frozen base of an adapter is held in it.
    """
    from transformers import AutoModelForCausalLM

    location, extra = hub_location(config.pretrained)
    default = torch.float32 if config.lora is None else compute_dtype
    options: dict[str, Any] = {**extra, "dtype": DTYPES.get(config.dtype, default)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        options["quantization_config"] = quantization_options(config.quantization, compute_dtype)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            location, trust_remote_code=config.trust_remote_code, **options
        )
    except OSError as error:
        raise UserError(
            f"model.policy.pretrained={config.pretrained!r} has no weights that can be read ({first_line(error)}): "
            "put the model's safetensors files into the folder"
        ) from error
    if "gguf_file" in extra:
        forget_gguf(model)
    keep_head_input_contiguous(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks 4-bit weights on the CPU when a forward runs in eval mode, and leaves them
            # so: later training steps would get no gradient through them
            cast(Any, module).support_avx512bf16_for_cpu = False
    return model


def keep_head_input_contiguous(model: PreTrainedModel) -> None:
    """Keep a frozen head from being copied once per sequence.

    ``logits_to_keep`` hands the head a strided slice; torch (2.13) then multiplies in batches, with the weight
    copied for each sequence, unless the weight requires a gradient.
    """
    model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)


def _contiguous_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


def load_policy(config: PolicyConfig, *, compute_dtype: torch.dtype) -> nn.Module:
    """Load the policy to train: all weights trainable, or a fresh adapter on a frozen base.

    Raises:
        UserError: if ``target_modules`` match nothing.
    """
    model = load_base_model(config, compute_dtype=compute_dtype)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is None:
        return model
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    if config.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    elif config.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        adapted: nn.Module = get_peft_model(
            model,
            PeftLoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.dropout,
                target_modules=config.lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=True,
        )
    except ValueError as error:
        raise UserError(f"model.policy.lora.target_modules: {first_line(error)}") from error
    return adapted


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


def write_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (an adapter in PEFT's layout), tokenizer, chat template and generation config."""
    config = cast(Any, model).config
    use_cache, config.use_cache = config.use_cache, True
    try:
        cast(Any, model).save_pretrained(folder, safe_serialization=True)
    finally:
        config.use_cache = use_cache
    tokenizer.save_pretrained(folder)


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
    """Return every token id that ends a response: the generation config's, else the model's, else the tokenizer's."""
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(model_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            return set(value) if isinstance(value, list) else {value}
    raise UserError("the policy names no end-of-sequence token: set eos_token_id in its generation config")


def check_updates_survive(parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Refuse a learning rate whose updates round to nothing in the dtype of the weights.

    An Adam step moves a weight by about the learning rate; it is lost where that is under half the spacing of
    the dtype at the weight's size.

    Raises:
        UserError: if most trainable weights could not move.
    """
    lost = total = 0
    for parameter in parameters:
        spacing = parameter.detach().abs().float() * torch.finfo(parameter.dtype).eps
        lost += int((spacing > 2 * learning_rate).sum())
        total += parameter.numel()
    if total and lost > total / 2:
        raise UserError(
            f"model.learning_rate={learning_rate:g} is lost to rounding in {lost / total:.0%} of the trainable "
            "weights: hold them in float32 (model.policy.dtype: auto, trainer.precision: bf16-mixed) or use lora"
        )


def fingerprint(model: nn.Module, pretrained: str) -> str:
    """Return a digest of what decides a policy's outputs: its base and the exact trainable weights."""
    digest = hashlib.sha256(
        pretrained.encode()
    )  # twice as fast as blake2b where the processor has instructions for it
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:32]


def sampling_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy in ``dtype`` that shares nothing with ``model`` and is in eval mode.

    Parameters are converted one by one, so that no second full-precision copy ever exists.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo).eval()
