"""The policy that is being trained, as the rest of the loop sees it: loaded, sampled, fingerprinted, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sppo_lightning import policy as policies
from sppo_lightning import pretrained
from sppo_lightning.policy import PolicyConfig
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
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sampled_instead: nn.Module | None = None
        self._fingerprinted: tuple[tuple[int, int], str] | None = None  # which weights, and their digest

    def check(self) -> PretrainedConfig:
        """Read the tokenizer and the model's own config, and return the config; no weights load.

        Raises:
            UserError: if folder or file do not fit.
        """
        config = pretrained.load_model_config(
            self.config.pretrained,
            key=KEY,
            trust_remote_code=self.config.trust_remote_code,
            expect="causal-lm",
        )
        self._tokenizer = pretrained.load_tokenizer(
            self.config.pretrained, key=KEY, trust_remote_code=self.config.trust_remote_code
        )
        return config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        assert self._tokenizer is not None, "check() comes first"
        return self._tokenizer

    def load(self, compute_dtype: torch.dtype) -> nn.Module:
        """Load the policy to train, in training mode, without dropout but an adapter's own.

        Args:
            compute_dtype: dtype of the trainer's matrix products.
        """
        self._compute_dtype = compute_dtype
        self._model = policies.load_policy(self.config, compute_dtype=compute_dtype)
        policies.disable_dropout(self._model)
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
        """Yield the policy that the run started from: the adapter switched off, or the weights read again."""
        if self.config.lora is not None:
            with cast(Any, self.model).disable_adapter():
                yield self.model
        else:
            model = policies.load_base_model(self.config, compute_dtype=self._compute_dtype)
            policies.disable_dropout(model)
            trained = next(self.model.parameters())
            yield cast(nn.Module, model).to(trained.device, trained.dtype)

    def sampling_model(self) -> nn.Module:
        """Return the current policy to sample from.

        The policy itself where it is already in the compute dtype or carries an adapter; else a copy in the
        compute dtype, so that nothing is cast at every token.
        """
        model = self._sampled_instead or self.model
        self._release(model)
        dtype = next(model.parameters()).dtype
        if self.config.lora is not None or dtype == self._compute_dtype:
            return model.eval()
        return policies.sampling_copy(model, self._compute_dtype)

    @contextmanager
    def sampling_initial_policy(self) -> Iterator[None]:
        """Let :meth:`sampling_model` return the policy that the run started from while the context lasts."""
        with self.initial() as model:
            self._sampled_instead = model
            try:
                yield
            finally:
                self._sampled_instead = None

    def fingerprint(self) -> str:
        """Return a digest of the policy that is sampled."""
        if self._sampled_instead is not None:
            return policies.fingerprint(self._sampled_instead, self.config.pretrained)
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        weights = (self._steps(), sum(parameter._version for parameter in trained))
        if self._fingerprinted is None or self._fingerprinted[0] != weights:
            self._fingerprinted = weights, policies.fingerprint(self.model, self.config.pretrained)
        return self._fingerprinted[1]

    def export(self, folder: Path) -> None:
        """Write the policy that is sampled as a Hugging Face folder; an adapter in PEFT's layout."""
        if self._sampled_instead is not None and self.config.lora is not None:
            raise UserError(
                "the initial policy of a run with lora is its adapter switched off, which no folder holds: evaluate "
                "it in fit, or with generator HFGenerator"
            )
        model = self._sampled_instead or self.model
        self._release(model)
        policies.write_folder(model, self.tokenizer, folder)
