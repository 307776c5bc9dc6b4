"""The policy that is being trained, as the rest of the loop sees it: loaded, sampled, fingerprinted, exported.

Where its weights are spread over processes, loading, fingerprints, the initial policy and :meth:`LivePolicy.save` are
collectives. Nothing is ever sampled from spread weights: :meth:`LivePolicy.publish` writes the policy into a folder,
from which each process that samples reads a whole one, or a server does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sppo_lightning.policy import loading as policies
from sppo_lightning.policy import lora, pretrained, sharding
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import digest_of, fingerprint
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.prompts.encoding import choose_chat_template
from sppo_lightning.types import Ranks, UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KEY = "model.policy.pretrained"


class LivePolicy:
    """Holds the policy between its loading and its last export; what generators take it from.

    Args:
        config: which model, and how to hold it.
        steps: optimizer steps taken so far.
        release: undoes what the training forward does to a model.
        workspace: folder that all processes see, for a policy whose weights are spread; made and removed as needed.
    """

    def __init__(
        self,
        config: PolicyConfig,
        *,
        steps: Callable[[], int],
        release: Callable[[nn.Module], None],
        workspace: Callable[[], Path],
    ) -> None:
        self.config = config
        self._workspace = workspace
        self._published: str | None = None  # fingerprint of what the workspace holds
        self._steps = steps
        self._release = release
        self._model: nn.Module | None = None
        self._compute_dtype = torch.float32
        self._device = policies.CPU
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model_config: PretrainedConfig | None = None
        self._first_adapter: dict[str, Tensor] | None = None  # of a run that started from one; on the CPU
        self._initial: nn.Module | None = None  # the initial policy, while it stands in for the trained one
        self._initial_fingerprint: str | None = None  # of it
        self._mesh: DeviceMesh | None = None  # that the weights are spread over
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
        choose_chat_template(tokenizer, config.chat_template, key="model.policy.chat_template")
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

    def load(
        self, compute_dtype: torch.dtype, device: torch.device, mesh: DeviceMesh | None = None
    ) -> nn.Module:
        """Load the policy to train, in training mode, without dropout but an adapter's own.

        Args:
            compute_dtype: dtype of the trainer's matrix products.
            device: where to.
            mesh: processes to spread the weights over; ``None``: this one holds them all.

        Raises:
            UserError: if the weights cannot be spread.
        """
        self._compute_dtype, self._device, self._mesh = compute_dtype, device, mesh
        if mesh is not None and self.config.quantization != "none":
            raise UserError(
                f"model.policy.quantization={self.config.quantization} and trainer.strategy=ModelParallelStrategy do "
                "not go together: quantised weights cannot be spread over processes; set quantization: none, or use "
                "strategy ddp"
            )
        if mesh is None:
            self._model = policies.load_policy(self.config, compute_dtype=compute_dtype, device=device)
        else:
            self._model = self._spread(
                lambda: policies.load_policy(self.config, compute_dtype=compute_dtype), mesh
            )
        policies.disable_dropout(self._model)
        if self.config.lora is not None and self.config.lora.adapter is not None:
            self._first_adapter = lora.copied_weights(self._model)
        return self._model.train()

    def _spread(self, read: Callable[[], nn.Module], mesh: DeviceMesh) -> nn.Module:
        """Return a policy whose weights are spread: the first process reads them, into host memory."""
        model = read() if mesh.get_local_rank() == 0 else self._skeleton()
        cast(Any, unwrapped(model)).generation_config = sharding.from_first_of(
            mesh, unwrapped(model).generation_config
        )
        sharding.spread(model, mesh)
        return model

    def _skeleton(self) -> nn.Module:
        """Return the policy without its weights."""
        model = policies.skeleton(self.config, self.model_config, compute_dtype=self._compute_dtype)
        policies.keep_head_input_contiguous(unwrapped(model))
        return model

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return self._mesh is not None

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
            self._initial, self._initial_fingerprint = model, None
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
        elif self._mesh is not None:
            initial = self._spread(
                lambda: policies.load_policy(self.config, compute_dtype=self._compute_dtype), self._mesh
            )
            policies.disable_dropout(initial)
            yield initial
        else:
            model = policies.load_base_model(
                self.config, compute_dtype=self._compute_dtype, device=self._device
            )
            policies.disable_dropout(model)
            yield cast(nn.Module, model).to(next(self.model.parameters()).dtype)  # doubled under 64-true

    @property
    def quantized(self) -> bool:
        """Whether its base is held in fewer bits than a folder of it would be."""
        own = getattr(self.model_config, "quantization_config", None)
        return own is not None or self.config.quantization != "none"

    def publish(self, ranks: Ranks, *, wanted: bool) -> None:
        """Let every process have a whole policy to sample from, a collective; nothing to do where it is whole.

        Weights are gathered one by one in the compute dtype, and the first process writes them into a folder in the
        workspace, where they stay until :meth:`withdraw`.

        Args:
            ranks: the processes.
            wanted: whether this one will sample.
        """
        if not self.is_sharded:
            return
        fingerprint = self.fingerprint()  # those that sample ask for it later, each by itself
        here = self._initial is not None or fingerprint == self._published
        if here or not any(flag for part in ranks.gather([wanted]) for flag in part):
            return
        dtype = self._compute_dtype if self.config.lora is None else None
        model = sharding.assemble(self.model, self._skeleton, dtype=dtype)
        if model is not None:
            shutil.rmtree(self._workspace(), ignore_errors=True)
            fresh = self._workspace() / "policy.new"
            write_folder(model, self.tokenizer, fresh)
            fresh.rename(self._place)
        self._published = fingerprint
        ranks.barrier("policy published")

    def withdraw(self) -> None:
        """Remove what :meth:`publish` or a killed run wrote, once no process samples any more."""
        if self.is_sharded and sharding.is_first(self.model):
            shutil.rmtree(self._workspace(), ignore_errors=True)
        self._published = None

    @property
    def _place(self) -> Path:
        return self._workspace() / "policy"

    def _whole(self, device: torch.device) -> nn.Module:
        """Read, by this process alone, the published policy or the initial one, where weights are spread."""
        config, dtype = self.config, self._compute_dtype
        if self._initial is None:
            assert self._published is not None, "publish() comes first"
            if config.lora is None:
                config = replace(config, pretrained=str(self._place))
            else:
                adapter = LoRAConfig(adapter=str(self._place), dropout=config.lora.dropout)
                config = replace(config, lora=adapter)
        elif not self._holds_weights:
            config = replace(config, lora=None)
        if config.lora is None:
            config = replace(config, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
        return policies.load_policy(config, compute_dtype=dtype, device=device).requires_grad_(False)

    def sampling_model(self) -> nn.Module:
        """Return the current policy to sample from.

        The policy itself where it is already in the compute dtype or carries an adapter; else a copy in the
        compute dtype, so that nothing is cast at every token. Where weights are spread, a whole one on this process's
        device.
        """
        if self.is_sharded:
            return self._whole(self._device).eval()
        model = self._initial or self.model
        self._release(model)
        dtype = next(model.parameters()).dtype
        if self.config.lora is not None or dtype == self._compute_dtype:
            return model.eval()
        return policies.sampling_copy(model, self._compute_dtype)

    def fingerprint(self) -> str:
        """Return a digest of the policy: of the initial one while it stands in.

        Where weights are spread, the first call after a change of them is a collective.
        """
        name = self.config.pretrained
        if self._initial is not None:
            if self._initial_fingerprint is None:
                self._initial_fingerprint = (
                    fingerprint(self._initial, name) if self._holds_weights else digest_of(name)
                )
            return self._initial_fingerprint
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        weights = (self._steps(), sum(parameter._version for parameter in trained))
        if self._fingerprinted is None or self._fingerprinted[0] != weights:
            self._fingerprinted = weights, fingerprint(self.model, name)
        return self._fingerprinted[1]

    @property
    def _holds_weights(self) -> bool:
        """Whether the initial policy has weights of its own beside the base's."""
        return self.config.lora is None or self._first_adapter is not None

    def save(self, folder: Path, *, first: bool) -> None:
        """Write the policy as :meth:`export` does, by one process; all of them call it together.

        Args:
            folder: where to.
            first: whether this process is the one that writes.
        """
        if self.is_sharded:
            model = sharding.assemble(self.model, self._skeleton, dtype=None)
            if model is not None:
                write_folder(model, self.tokenizer, folder)
        elif first:
            self.export(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, by this process alone; an adapter in PEFT's layout.

        Where weights are spread, the folder is the published one, in the compute dtype.
        """
        if self._initial is not None and not self._holds_weights:
            raise UserError(
                "the initial policy of a run with lora is its adapter switched off, which no folder holds: evaluate "
                "it in fit, or with generator HFGenerator"
            )
        if self.is_sharded and self._initial is None:
            assert self._published is not None, "publish() comes first"
            shutil.copytree(self._place, folder, copy_function=_linked)
            return
        model = self._whole(policies.CPU) if self.is_sharded else self._initial or self.model
        self._release(model)
        write_folder(model, self.tokenizer, folder)


def _linked(source: str, target: str) -> str:
    """Link weights, which nobody writes into, and copy everything else."""
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return target
    return shutil.copy2(source, target)
