"""A finished run's policy, loaded for an exporter: one model in memory at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.export.logps import Logps, digests, merged_on_the_fly, read, response_logps, sample_pairs
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.merging import adapted_layers, merge_into_base, merged_weight
from sppo_lightning.policy.pretrained import class_of, load_tokenizer, stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SavedPolicy:
    """What an exporter takes a policy from. Let a model go before you load the next: one has to fit into memory.

    Args:
        run: where the policy is, and what made it.
        dtype: of a full model's weights, as the user asked for; ``None``: ``auto``.
        device: where to compute.

    Attributes:
        tokenizer: the policy's, with its chat template.
        loader: transformers' class to load the model by, or the base of an adapter.
        pairs: a few of the run's own, whose responses are compared.
        merged_logps: of their response tokens, ``[N]`` nats, by merged weights before they were rounded; ``None``
            unless :meth:`load_full` merged any.
        expected: digests of the weights that :meth:`load_full` changed, which :meth:`Exporter.read_back` must find.
    """

    def __init__(self, run: FinishedRun, *, dtype: torch.dtype | None, device: torch.device) -> None:
        self.run = run
        self.dtype = dtype
        self.device = device
        self.trust_remote_code = run.policy_config.trust_remote_code
        model_config = run.model_config()
        self.loader: Any = class_of(model_config)
        named = stored_dtype(model_config) if run.has_adapter else None
        self.base_dtype = named or torch.float32  # a .gguf file names none
        self.tokenizer = load_tokenizer(
            str(run.policy_folder), key="the run's policy", trust_remote_code=self.trust_remote_code
        )
        self.pairs = sample_pairs(run.folder.iteration(run.iteration).read_pairs())
        self.merged_logps: Tensor | None = None
        self.expected: dict[str, str] = {}
        self._logps: Logps | None = None

    def load(self) -> nn.Module:
        """Load the full model, or PEFT's model of the adapter on the base as its own files have it."""
        run = self.run
        model: nn.Module = (
            self.load_adapter(run.policy_folder) if run.has_adapter else self.load_model(run.policy_folder)
        )
        self._logps = read(model, self.pairs)
        return model

    def load_full(self) -> PreTrainedModel:
        """Load one full model, the adapter merged into it if there is one, in the dtype that was asked for.

        Raises:
            UserError: if the adapter cannot be merged exactly.
        """
        model: Any = self.load()
        if not self.run.has_adapter:
            dtype = self.dtype or model.dtype
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            self.expected = digests(model.named_parameters())
            return cast("PreTrainedModel", model)
        with merged_on_the_fly(model):
            self.merged_logps = response_logps(model, self.pairs)
        dtype = self.dtype or self.base_dtype
        self.expected = digests(
            (f"{name}.weight", merged_weight(layer).to(dtype))
            for name, layer in adapted_layers(model).items()
        )
        return cast("PreTrainedModel", merge_into_base(model, dtype=dtype))

    def load_model(self, folder: Path) -> PreTrainedModel:
        """Load the full model in a folder."""
        model = self.loader.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        return cast("PreTrainedModel", cast(nn.Module, model).to(self.device).eval())

    def load_adapter(self, folder: Path) -> nn.Module:
        """Load the adapter in a folder in PEFT's layout, on the run's base as its own files have it."""
        plain = replace(self.run.policy_config, quantization="none", double_quantization=True)
        return self._on_base(plain, self.base_dtype, folder)

    def load_as_trained(self) -> nn.Module:
        """Load the adapter on its base as training held it, quantised or rounded."""
        return self._on_base(self.run.policy_config, self.run.weights_dtype, self.run.policy_folder)

    def logps(self) -> Logps:
        """Return what the policy makes of the pairs, as :meth:`load` gives it."""
        if self._logps is None:
            self.load()
        assert self._logps is not None
        return self._logps

    def _on_base(self, base: PolicyConfig, dtype: torch.dtype, adapter: Path) -> nn.Module:
        from peft import PeftModel

        config = replace(base, dtype="auto", attn_implementation=None)
        model = policies.load_base_model(config, compute_dtype=dtype, device=self.device)
        policies.disable_dropout(model)
        return cast(nn.Module, PeftModel.from_pretrained(model, adapter)).eval()
