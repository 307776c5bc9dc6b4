"""Settings of the policy: which model, how it is held, what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any, ClassVar, Literal

from sppo_lightning.paths import expand_path
from sppo_lightning.types import UserError

KEY = "model.policy.lora"


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685) through PEFT; the adapter trains in float32.

    Args:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on the adapter's input while training; off for log-prob passes of the reference.
        target_modules: names of the layers to adapt; ``all-linear`` (all but the output head) or a list.
        rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        dora: train the magnitude of each output as well (arXiv 2402.09353); vLLM serves no such adapters.
        adapter: start from this LoRA adapter, a folder in PEFT's layout or a hub id. It says its own rank, alpha,
            target modules and kind, so that only ``dropout`` may be set too.
        ignore_adapter_base: take ``pretrained`` as the adapter's base although the adapter names another one (a folder
            that has moved, a quantised copy); layers and shapes are compared all the same.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    adapter: str | None = None
    ignore_adapter_base: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UserError(f"{KEY}.dropout={self.dropout} must lie in [0, 1)")
        if self.adapter is not None:
            self.adapter = expand_path(self.adapter, key=f"{KEY}.adapter")
            fresh = LoRAConfig(rank=1, alpha=1.0)
            own = {"rank": None, "alpha": None, "target_modules": fresh.target_modules, "rslora": False}
            for name, default in {**own, "dora": False}.items():
                if getattr(self, name) != default:
                    raise UserError(
                        f"{KEY}.{name}={getattr(self, name)} and {KEY}.adapter do not go together: the adapter says "
                        "its own; leave one of them out"
                    )
        elif self.ignore_adapter_base:
            raise UserError(f"{KEY}.ignore_adapter_base is for {KEY}.adapter: leave it out")
        elif self.rank is None or self.alpha is None:
            missing = "rank" if self.rank is None else "alpha"
            raise UserError(
                f"{KEY} needs rank and alpha (or adapter, to start from one): set {KEY}.{missing}"
            )
        elif self.rank < 1:
            raise UserError(f"{KEY}.rank={self.rank} must be at least 1")
        elif not self.alpha > 0:
            raise UserError(f"{KEY}.alpha={self.alpha} must be greater than 0")


@dataclass
class PolicyConfig:
    """Which model to train and how to hold it.

    Args:
        pretrained: a HF folder, a hub id, or a ``.gguf`` file.
        dtype: dtype of the weights. ``auto``: float32 for full fine-tuning (updates of 1e-7 vanish in
            bfloat16), the trainer's compute dtype for the frozen base of an adapter.
        attn_implementation: attention kernel, as in transformers; ``None`` leaves the choice to it. A training forward
            that shares prompts brings its own (``model.pair_forward``).
        quantization: 4-bit NF4 (QLoRA, arXiv 2305.14314) or 8-bit weights through bitsandbytes, for the frozen base of
            an adapter. Products are computed in the trainer's compute dtype.
        double_quantization: quantise the scales of NF4 too: 4.13 instead of 4.5 bits a weight.
        lora: train a low-rank adapter instead of all weights.
        gradient_checkpointing: recompute activations in the backward pass.
        chat_template: a Jinja file to template conversations with, instead of the tokenizer's own template; ``plain``:
            prompts are plain text and go in as they are. A tokenizer without a template needs one of them.
        chat_template_kwargs: further variables of the chat template, e.g. ``{enable_thinking: false}``.
        template_date: the day, ``YYYY-MM-DD``, that chat templates print which print the date, so that a run that is
            resumed on another day has the same prompts. ``None``: today; the command line fills in the day on which
            the run starts.
        trust_remote_code: run code that comes with the model.
    """

    free_settings: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})
    """Settings that decide speed or place, never results: a run that resumes may change them."""

    pretrained: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["none", "nf4", "int8"] = "none"
    double_quantization: bool = True
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    template_date: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.pretrained = expand_path(self.pretrained, key="model.policy.pretrained")
        if self.chat_template is not None:
            self.chat_template = expand_path(self.chat_template, key="model.policy.chat_template")
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise UserError(
                    f"model.policy.template_date={self.template_date!r} is no day: write YYYY-MM-DD"
                ) from error
        if self.quantization != "none" and self.lora is None:
            raise UserError(
                f"model.policy.quantization={self.quantization} freezes the weights, so that there is nothing "
                "to train: set model.policy.lora too, or quantization: none"
            )
        if self.quantization == "int8" and self.lora is not None and self.lora.dora:
            raise UserError(
                f"{KEY}.dora=true and quantization=int8 do not go together: PEFT 0.21 cannot read the 8-bit weights "
                "whose magnitudes it would train; use nf4 or none"
            )
        if not self.double_quantization and self.quantization != "nf4":
            raise UserError(
                f"model.policy.double_quantization=false with quantization={self.quantization} would do nothing: only "
                "nf4 has scales to quantise; leave it out"
            )
