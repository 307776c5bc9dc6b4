"""One state of the policy, as engines sample from it and exports write it."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sppo_lightning.policy import loading
from sppo_lightning.policy.anatomy import embedding_rows
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.lora import adapter_is_off
from sppo_lightning.policy.sharding import gather_full_model
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.system.durable import link_weights
from sppo_lightning.types import Ranks, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class PolicySnapshot(ABC):
    """The policy in one state of its weights; once they have changed, ask for another one.

    Args:
        spec: which model.
        model: for the training forward, which is a collective where the weights are sharded.
    """

    spec: PolicySpec
    model: nn.Module
    _fingerprint: str | None = field(default=None, init=False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.spec.tokenizer

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        model = cast(Any, self.model)
        generation = getattr(model, "generation_config", None)
        return frozenset(loading.end_token_ids(model.config, self.tokenizer, generation))

    @property
    def embedding_rows(self) -> int:
        """How many token ids it has embeddings for, from 0 on: no other can be trained on."""
        return embedding_rows(self.model)

    @property
    def quantized(self) -> bool:
        """Whether its base is held in fewer bits than a folder of it would be."""
        return self.spec.quantized

    def fingerprint(self) -> str:
        """Return a digest of base and trained weights; where those are sharded, the first call is a collective."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model, self.spec.config.pretrained)
        return self._fingerprint

    @abstractmethod
    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        """Make full weights ready for those who sample or export, a collective.

        Args:
            ranks: the processes.
            needed: whether this one will.
        """

    @abstractmethod
    def sampling_model(self) -> nn.Module:
        """Return full weights to sample from: in eval mode, on this process's device."""

    def resident_model(self) -> nn.Module | None:
        """Return the policy as it lies in this process, or ``None`` where its weights are sharded."""
        return None

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder, by this process alone; an adapter in PEFT's layout."""


@dataclass(eq=False)
class UnshardedSnapshot(PolicySnapshot):
    """Full weights, in this process.

    Args:
        release: undoes what the training forward does to a model.
    """

    release: Callable[[nn.Module], None]

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        """Do nothing: every process has full weights."""

    def sampling_model(self) -> nn.Module:
        """Return the policy itself where it is in the compute dtype or carries an adapter, else a copy in that dtype.

        A copy, so that nothing is cast at every token.
        """
        self.release(self.model)
        dtype = next(self.model.parameters()).dtype
        if self.spec.config.lora is not None or dtype == self.spec.compute_dtype:
            return self.model.eval()
        return loading.sampling_copy(self.model, self.spec.compute_dtype)

    def resident_model(self) -> nn.Module:
        """Return the policy itself, in eval mode and the dtype that it is held in."""
        self.release(self.model)
        return self.model.eval()

    def export(self, folder: Path) -> None:
        """Write the policy in the dtype that it is held in."""
        _refuse_adapter_that_is_off(self.model)
        self.release(self.model)
        write_folder(self.model, self.tokenizer, folder)


@dataclass(eq=False)
class ShardedSnapshot(PolicySnapshot):
    """Sharded weights, which are gathered into a folder that every process reads full weights from.

    Args:
        workspace: folder that all processes see; what is in it is replaced.
    """

    workspace: Path
    _synced: bool = field(default=False, init=False)

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        """Gather the weights one by one in the compute dtype and write them, once, if any process needs them."""
        self.fingerprint()  # those that sample ask for it later, each by itself
        if self._synced or not any(flag for part in ranks.gather([needed]) for flag in part):
            return
        dtype = self.spec.compute_dtype if self.spec.config.lora is None else None
        model = gather_full_model(self.model, self.spec.meta_model, dtype=dtype)
        if model is not None:
            shutil.rmtree(self.workspace, ignore_errors=True)
            fresh = self.workspace / "policy.new"
            write_folder(model, self.tokenizer, fresh)
            fresh.rename(self._folder)
        self._synced = True
        ranks.barrier("sampling weights synced")

    @property
    def _folder(self) -> Path:
        return self.workspace / "policy"

    def sampling_model(self) -> nn.Module:
        """Read full weights from the folder."""
        assert self._synced, "sync_sampling_weights() comes first"
        config = self.spec.config
        if config.lora is None:
            config = replace(config, pretrained=str(self._folder))
        else:
            adapter = LoRAConfig(adapter=str(self._folder), dropout=config.lora.dropout)
            config = replace(config, lora=adapter)
        return _read_full(config, self.spec.compute_dtype, self.spec.device).eval()

    def export(self, folder: Path) -> None:
        """Copy the folder, whose weights are in the compute dtype."""
        assert self._synced, "sync_sampling_weights() comes first"
        shutil.copytree(self._folder, folder, copy_function=link_weights)


class ShardedInitialSnapshot(PolicySnapshot):
    """Sharded weights that a run started from: every process reads full ones from where the run did."""

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        """Take the fingerprint: those that sample ask for it later, each by itself."""
        self.fingerprint()

    def sampling_model(self) -> nn.Module:
        """Read full weights."""
        return self._read(self.spec.device).eval()

    def export(self, folder: Path) -> None:
        """Read full weights and write them, in the compute dtype where there is no adapter."""
        _refuse_adapter_that_is_off(self.model)
        write_folder(self._read(loading.CPU), self.tokenizer, folder)

    def _read(self, device: torch.device) -> nn.Module:
        config = self.spec.config
        if adapter_is_off(self.model):
            config = replace(config, lora=None)
        return _read_full(config, self.spec.compute_dtype, device)


def _read_full(config: PolicyConfig, compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Read a policy to sample from, by this process alone; without an adapter in the compute dtype."""
    if config.lora is None:
        config = replace(config, dtype=str(compute_dtype).removeprefix("torch."))  # type: ignore[arg-type]
    return loading.load_policy(config, compute_dtype=compute_dtype, device=device).requires_grad_(False)


def _refuse_adapter_that_is_off(model: nn.Module) -> None:
    if adapter_is_off(model):
        raise UserError(
            "the initial policy of a run with lora is its adapter switched off, which no folder holds: evaluate "
            "it in fit, or with generator HFGenerator"
        )
