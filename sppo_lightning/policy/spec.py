"""Which policy a run trains, and what is known of it before its weights load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sppo_lightning.policy import loading, pretrained
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.pretrained import hub_location
from sppo_lightning.prompts.chat_template import choose_chat_template
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class PolicySpec:
    """The policy's config, the tokenizer and model config that it names, and what it will run on.

    Args:
        config: which model, and how to hold it.
    """

    compute_dtype: torch.dtype
    """Dtype of the trainer's matrix products."""
    device: torch.device
    """That the policy is trained and sampled on."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model_config: PretrainedConfig | None = None

    def check(self, *, compute_dtype: torch.dtype, device: torch.device) -> None:
        """Read tokenizer and model config, and try on them what the config asks for; no weights load.

        Args:
            compute_dtype: dtype of the trainer's matrix products.
            device: that the policy will be on.

        Raises:
            UserError: if folder, file, tokenizer, adapter or device do not fit.
        """
        self.compute_dtype, self.device = compute_dtype, device
        if self._model_config is not None:
            return
        config, key = self.config, loading.KEY
        pretrained.check_quantization(config.quantization, device, key="model.policy.quantization")
        model_config = pretrained.load_model_config(
            config.pretrained, key=key, trust_remote_code=config.trust_remote_code, expect="causal-lm"
        )
        self._check_stored_quantization(model_config)
        tokenizer = pretrained.load_tokenizer(
            config.pretrained, key=key, trust_remote_code=config.trust_remote_code
        )
        choose_chat_template(tokenizer, config.chat_template, key="model.policy.chat_template")
        model = loading.meta_model(config, model_config, compute_dtype=compute_dtype)
        pretrained.check_vocabulary(tokenizer, unwrapped(model), key=key)
        pretrained.check_end_tokens(config.pretrained, unwrapped(model), key=key)
        self._tokenizer, self._model_config = tokenizer, model_config

    def _check_stored_quantization(self, model_config: PretrainedConfig) -> None:
        """Refuse weights that are stored quantised where they cannot be trained, or would be quantised again."""
        stored: Any = getattr(model_config, "quantization_config", None)
        if stored is None or hub_location(self.config.pretrained)[1]:
            return
        settings = stored if isinstance(stored, dict) else stored.to_dict()
        method = settings.get("quant_method")
        kind = getattr(method, "value", method)
        given = f"{loading.KEY}={self.config.pretrained!r} is stored quantised ({kind})"
        if self.config.lora is None:
            raise UserError(f"{given}, and quantised weights cannot be trained: set model.policy.lora too")
        if self.config.quantization != "none":
            raise UserError(
                f"{given}, so that model.policy.quantization={self.config.quantization} would do nothing: leave it "
                "out, or give the model's unquantised files"
            )

    @property
    def model_config(self) -> PretrainedConfig:
        """The model's own settings."""
        assert self._model_config is not None, "check() comes first"
        return self._model_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, with the chat template that the config chooses."""
        assert self._tokenizer is not None, "check() comes first"
        return self._tokenizer

    @property
    def quantized(self) -> bool:
        """Whether the policy's base is held in fewer bits than a folder of it would be."""
        own = getattr(self.model_config, "quantization_config", None)
        return own is not None or self.config.quantization != "none"

    def meta_model(self) -> nn.Module:
        """Return the policy to train without its weights, on the meta device."""
        model = loading.meta_model(self.config, self.model_config, compute_dtype=self.compute_dtype)
        loading.keep_head_input_contiguous(unwrapped(model))
        return model
