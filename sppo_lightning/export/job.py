"""One export: the models that are read for it, one in memory at a time, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sppo_lightning.export.check import (
    AdapterLogps,
    Distance,
    ExportedLogps,
    adapter_logps,
    compared,
    compared_with_stored,
    digests,
    exported_logps,
    merged_in_passing,
    response_logps,
    sample_pairs,
)
from sppo_lightning.export.files import write_adapter, write_model
from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.agreement import distance
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.folder import opened_by_peft
from sppo_lightning.policy.merging import adapted_layers, merge_into_base, merged_weight
from sppo_lightning.policy.pretrained import class_of, load_tokenizer, stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORTED = "the export and the trained policy"
ROUNDED = "the export and the adapter on the same base"


class ExportJob:
    """Writes a policy into a folder and reads it back; holds what the check found.

    Args:
        source: the policy to export.
        folder: where to.
        dtype: of the written weights; ``None``: what ``auto`` means.
        device: where to compute.
    """

    def __init__(
        self, source: FinishedRun, folder: Path, *, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.source = source
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.trust = source.policy.trust_remote_code
        self.pairs = sample_pairs(source.folder.iteration(source.iteration).read_pairs())
        self.tokenizer = load_tokenizer(
            str(source.place), key="the run's policy", trust_remote_code=self.trust
        )
        self.distances: list[Distance] = []  # outcome of the check
        self.altered: list[str] = []  # weights that are not what was to be written
        self.moved: float | None = None  # by training, nats per token; known for a fresh adapter
        model_config = source.model_config()
        self.loader: Any = class_of(model_config)  # transformers' class to load the model by
        named = stored_dtype(model_config) if source.adapted else None
        self.base_dtype = named or torch.float32  # a .gguf file names none

    @property
    def opened_by_peft(self) -> bool:
        """Whether PEFT finds and loads an adapter's base by itself."""
        return opened_by_peft(self.source.policy.pretrained, self.loader.__name__)

    def write_whole(self) -> None:
        """Write the weights of a run that trained all of them."""
        model = self._whole(self.source.place)
        trained = response_logps(model, self.pairs)
        wanted = self.dtype or model.dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wanted)
        written = digests(model.named_parameters())
        write_model(model, self.tokenizer, self.folder)
        del model
        exported, rounding = self._read_back(written)
        self.distances = [compared(EXPORTED, exported, trained, rounding=rounding)]

    def write_adapter(self) -> None:
        """Write the adapter, and read it on its own base."""
        trained = self._trained_logps()
        model = self._on_own_base()
        own = response_logps(model, self.pairs)
        write_adapter(unwrapped(model), self.tokenizer, self.folder, source=self.source)
        del model
        exported = adapter_logps(self._as_loaded_by_others(), self.pairs)
        base = distance(exported.base, trained.base)
        self.moved = self._moved(trained)
        self.distances += [
            compared("the export and the run's adapter, on the same base", exported.policy, own),
            compared(EXPORTED, exported.policy, trained.policy, base=base),
        ]

    def write_merged(self) -> None:
        """Write base and adapter as one model."""
        trained = self._trained_logps()
        model = self._on_own_base()
        own = adapter_logps(model, self.pairs)
        with merged_in_passing(model):
            merged = response_logps(model, self.pairs)
        dtype = self.dtype or self.base_dtype
        layers = adapted_layers(model).items()
        written = digests((f"{name}.weight", merged_weight(layer).to(dtype)) for name, layer in layers)
        del layers
        whole = merge_into_base(model, dtype=dtype)
        write_model(whole, self.tokenizer, self.folder)
        del model, whole
        exported, rounding = self._read_back(written)
        base = distance(own.base, trained.base)
        self.moved = self._moved(own)
        self.distances += [
            compared(
                "the merged weights, before rounding, and the adapter on the same base", merged, own.policy
            ),
            compared(ROUNDED, exported, own.policy, rounding=rounding),
            compared(EXPORTED, exported, trained.policy, rounding=rounding, base=base),
        ]

    def _moved(self, found: AdapterLogps) -> float | None:
        """Return what training changed, if it began with the base alone."""
        lora = self.source.policy.lora
        begun_with_base = lora is not None and lora.adapter is None
        return distance(found.policy, found.base) if begun_with_base else None

    def _read_back(self, written: Mapping[str, str]) -> ExportedLogps:
        """Read the pairs with the exported model, and note which weights are not those that were ``written``."""
        model = self._whole(self.folder)
        found = digests((name, weight) for name, weight in model.named_parameters() if name in written)
        self.altered = [name for name, digest in written.items() if found.get(name) != digest]
        return exported_logps(model, self.pairs)

    def _whole(self, folder: Path) -> PreTrainedModel:
        model = self.loader.from_pretrained(folder, trust_remote_code=self.trust)
        return cast("PreTrainedModel", cast(nn.Module, model).to(self.device).eval())

    def _trained_logps(self) -> AdapterLogps:
        """Read the pairs with the policy as training held it, and see to it that its base is the run's."""
        model = self._as_trained()
        trained = adapter_logps(model, self.pairs)
        iteration = self.source.base_as_reference
        if iteration is not None:
            pairs = sample_pairs(self.source.folder.iteration(iteration).read_pairs())
            base = trained.base if iteration == self.source.iteration else adapter_logps(model, pairs).base
            found = compared_with_stored(
                base, pairs, iteration=iteration, coarsest=self.source.coarsest_dtype
            )
            self.distances.append(found)
        return trained

    def _as_trained(self) -> nn.Module:
        """Return the policy on its base as training held it."""
        config = replace(self.source.policy, dtype="auto", attn_implementation=None)
        return self._adapted(config, self.source.held_dtype)

    def _on_own_base(self) -> nn.Module:
        """Return the policy on its base as the base's files have it."""
        return self._adapted(self._plain_base, self.base_dtype)

    @property
    def _plain_base(self) -> PolicyConfig:
        return replace(
            self.source.policy,
            dtype="auto",
            attn_implementation=None,
            quantization="none",
            double_quantization=True,
        )

    def _adapted(self, config: PolicyConfig, dtype: torch.dtype, place: Path | None = None) -> nn.Module:
        from peft import PeftModel

        base = policies.load_base_model(config, compute_dtype=dtype, device=self.device)
        policies.disable_dropout(base)
        return cast(nn.Module, PeftModel.from_pretrained(base, place or self.source.place)).eval()

    def _as_loaded_by_others(self) -> nn.Module:
        """Return the exported adapter as PEFT loads it by its folder's name alone, where it can."""
        from peft import AutoPeftModelForCausalLM

        if not self.opened_by_peft:
            return self._adapted(self._plain_base, self.base_dtype, self.folder)
        model = AutoPeftModelForCausalLM.from_pretrained(self.folder, trust_remote_code=self.trust)
        return cast(nn.Module, model).to(self.device).eval()
