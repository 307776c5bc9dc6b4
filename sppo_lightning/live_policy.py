"""The policy that is being trained, as the rest of the loop sees it: loaded, sampled, fingerprinted, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning import lora, pretrained, prompts
from sppo_lightning import policy as policies
from sppo_lightning.adapters import unwrapped
from sppo_lightning.policy_config import PolicyConfig
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KEY = "model.policy.pretrained"


class LivePolicy:
    """Holds the policy between its loading and its last export; what generators take it from.

    Args:
        config: which model, and how to hold it.
        steps: optimizer steps taken so far.
        release: undoes what the training forward does to a model.
    """

    def __init__(
        self, config: PolicyConfig, *, steps: Callable[[], int], release: Callable[[nn.Module], None]
    ) -> None:
        self.config = config
        self._steps = steps
        self._release = release
        self._model: nn.Module | None = None
        self._compute_dtype = torch.float32
        self._device = policies.CPU
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model_config: PretrainedConfig | None = None
        self._first_adapter: dict[str, Tensor] | None = None  # of a run that started from one; on the CPU
        self._initial: nn.Module | None = None  # the initial policy, while it stands in for the trained one
        self._fingerprinted: tuple[tuple[int, int], str] | None = None  # which weights, and their digest

    def check(self, *, compute_dtype: torch.dtype, device: torch.device) -> None:
        """Read the tokenizer and the model's own config, and try on them what the config asks for; no weights load.

        Args:
            compute_dtype: dtype of the trainer's matrix products.
            device: that the policy will be on.

        Raises:
            UserError: if folder, file, tokenizer, adapter or device do not fit.
        """
        if self._model_config is not None:
            return
        config = self.config
        pretrained.check_quantization(config.quantization, device, key="model.policy.quantization")
        model_config = pretrained.load_model_config(
            config.pretrained, key=KEY, trust_remote_code=config.trust_remote_code, expect="causal-lm"
        )
        tokenizer = pretrained.load_tokenizer(
            config.pretrained, key=KEY, trust_remote_code=config.trust_remote_code
        )
        prompts.choose_chat_template(tokenizer, config.chat_template, key="model.policy.chat_template")
        skeleton = policies.skeleton(config, model_config, compute_dtype=compute_dtype)
        pretrained.check_vocabulary(tokenizer, unwrapped(skeleton), key=KEY)
        self._tokenizer, self._model_config = tokenizer, model_config

    @property
    def model_config(self) -> PretrainedConfig:
        """The model's own settings."""
        assert self._model_config is not None, "check() comes first"
        return self._model_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        assert self._tokenizer is not None, "check() comes first"
        return self._tokenizer

    def load(self, compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Load the policy to train, in training mode, without dropout but an adapter's own.

        Args:
            compute_dtype: dtype of the trainer's matrix products.
            device: where to.
        """
        self._compute_dtype, self._device = compute_dtype, device
        self._model = policies.load_policy(self.config, compute_dtype=compute_dtype, device=device)
        policies.disable_dropout(self._model)
        if self.config.lora is not None and self.config.lora.adapter is not None:
            self._first_adapter = lora.copied_weights(self._model)
        return self._model.train()

    @property
    def model(self) -> nn.Module:
        """The policy that is being trained."""
        assert self._model is not None, "load() comes first"
        return self._model

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        model = cast(Any, self.model)
        generation = getattr(model, "generation_config", None)
        return frozenset(policies.end_token_ids(model.config, self.tokenizer, generation))

    @contextmanager
    def initial(self) -> Iterator[nn.Module]:
        """Let the policy that the run started from stand in for the trained one while the context lasts.

        The adapter switched off, or with the weights that it started from; with full fine-tuning the weights are read
        again.
        """
        with self._held_initial() as model:
            self._initial = model
            try:
                yield model
            finally:
                self._initial = None

    @contextmanager
    def _held_initial(self) -> Iterator[nn.Module]:
        if self._first_adapter is not None:
            with lora.replaced_weights(self.model, self._first_adapter):
                yield self.model
        elif self.config.lora is not None:
            with cast(Any, self.model).disable_adapter():
                yield self.model
        else:
            model = policies.load_base_model(
                self.config, compute_dtype=self._compute_dtype, device=self._device
            )
            policies.disable_dropout(model)
            yield cast(nn.Module, model).to(next(self.model.parameters()).dtype)  # doubled under 64-true

    def sampling_model(self) -> nn.Module:
        """Return the current policy to sample from.

        The policy itself where it is already in the compute dtype or carries an adapter; else a copy in the
        compute dtype, so that nothing is cast at every token.
        """
        model = self._initial or self.model
        self._release(model)
        dtype = next(model.parameters()).dtype
        if self.config.lora is not None or dtype == self._compute_dtype:
            return model.eval()
        return policies.sampling_copy(model, self._compute_dtype)

    def fingerprint(self) -> str:
        """Return a digest of the policy: of the initial one while it stands in."""
        name = self.config.pretrained
        if self._initial is not None:
            return (
                policies.fingerprint(self._initial, name) if self._holds_weights else policies.digest_of(name)
            )
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        weights = (self._steps(), sum(parameter._version for parameter in trained))
        if self._fingerprinted is None or self._fingerprinted[0] != weights:
            self._fingerprinted = weights, policies.fingerprint(self.model, name)
        return self._fingerprinted[1]

    @property
    def _holds_weights(self) -> bool:
        """Whether the initial policy has weights of its own beside the base's."""
        return self.config.lora is None or self._first_adapter is not None

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder; an adapter in PEFT's layout."""
        if self._initial is not None and not self._holds_weights:
            raise UserError(
                "the initial policy of a run with lora is its adapter switched off, which no folder holds: evaluate "
                "it in fit, or with generator HFGenerator"
            )
        model = self._initial or self.model
        self._release(model)
        policies.write_folder(model, self.tokenizer, folder)
