"""The policy that is being trained: loaded once, handed out as snapshots, saved.

Where its weights are sharded, loading, fingerprints, the initial policy and :meth:`TrainedPolicy.save` are collectives.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sppo_lightning.policy import loading, sharding
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.lora import copied_weights, replaced_weights
from sppo_lightning.policy.snapshot import (
    PolicySnapshot,
    ShardedInitialSnapshot,
    ShardedSnapshot,
    UnshardedSnapshot,
)
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KEPT_WEIGHTS = "weights.safetensors"
SHARDS_METADATA = ".metadata"  # as torch names it


@dataclass(eq=False)
class TrainedPolicy(ABC):
    """The policy in training mode, without dropout but an adapter's own; see :func:`load_trained_policy`.

    Args:
        spec: which model; checked.
        model: loaded.
        steps: returns the optimizer steps taken so far.
    """

    is_sharded: ClassVar[bool]
    """Whether each process holds a part of the weights, so that every forward is a collective."""

    spec: PolicySpec
    model: nn.Module
    steps: Callable[[], int]

    def __post_init__(self) -> None:
        loading.disable_dropout(self.model)
        self.model.train()
        lora = self.spec.config.lora
        started = lora is not None and lora.adapter is not None
        self._first_adapter = copied_weights(self.model) if started else None
        self._current: tuple[tuple[int, int], PolicySnapshot] | None = None  # and the state of its weights

    def current(self) -> PolicySnapshot:
        """Return a snapshot of the policy as it is now; the same one until its weights change."""
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        weights = (self.steps(), sum(parameter._version for parameter in trained))
        if self._current is None or self._current[0] != weights:
            self._current = weights, self._snapshot()
        return self._current[1]

    @contextmanager
    def initial(self) -> Iterator[PolicySnapshot]:
        """Yield a snapshot of the policy that the run started from, which is in memory while the context lasts.

        The adapter is switched off, or has its first weights swapped in; with full fine-tuning the weights are read
        again.
        """
        with self._initial_model() as model:
            snapshot = self._initial_snapshot(model)
            try:
                yield snapshot
            finally:
                del snapshot.model  # an engine may keep the snapshot for longer

    @contextmanager
    def _initial_model(self) -> Iterator[nn.Module]:
        if self._first_adapter is not None:
            with replaced_weights(self.model, self._first_adapter):
                yield self.model
        elif self.spec.config.lora is not None:
            with cast(Any, self.model).disable_adapter():
                yield self.model
        else:
            model = self._read_again()
            loading.disable_dropout(model)
            yield model

    @abstractmethod
    def save(self, folder: Path, *, is_rank0: bool) -> None:
        """Write a Hugging Face folder in the dtype that the policy is held in; all processes call it together.

        Args:
            folder: where to.
            is_rank0: whether this process is the one that writes.
        """

    @abstractmethod
    def keep(self, folder: Path, *, is_rank0: bool) -> None:
        """Write the trained weights as they are, for :meth:`restore`; all processes call it together.

        Args:
            folder: where to; not there yet.
            is_rank0: whether this process is the one that writes full weights.
        """

    @abstractmethod
    def keeps(self, folder: Path) -> bool:
        """Return whether a folder holds weights that :meth:`restore` may take."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Take the weights that :meth:`keep` wrote, to the last bit; all processes call it together.

        Raises:
            UserError: if they cannot be read, or are another model's.
        """

    @abstractmethod
    def cleanup_sampling_weights(self) -> None:
        """Remove what syncing the sampling weights or a killed run wrote, once no process samples any more."""

    @abstractmethod
    def _snapshot(self) -> PolicySnapshot: ...

    @abstractmethod
    def _initial_snapshot(self, model: nn.Module) -> PolicySnapshot: ...

    @abstractmethod
    def _read_again(self) -> nn.Module:
        """Return another model, with the full weights that the run started from."""


@dataclass(eq=False)
class UnshardedPolicy(TrainedPolicy):
    """Every process holds full weights.

    Args:
        release: undoes what the training forward does to a model.
    """

    is_sharded = False
    release: Callable[[nn.Module], None]

    def save(self, folder: Path, *, is_rank0: bool) -> None:
        """Write the policy, on rank 0."""
        if is_rank0:
            self.current().export(folder)

    def keep(self, folder: Path, *, is_rank0: bool) -> None:
        """Write one file, on rank 0."""
        if is_rank0:
            folder.mkdir(parents=True)
            save_file(copied_weights(self.model), folder / KEPT_WEIGHTS)

    def keeps(self, folder: Path) -> bool:
        """Return whether the file is there."""
        return (folder / KEPT_WEIGHTS).is_file()

    def restore(self, folder: Path) -> None:
        """Read the file, by every process."""
        path = folder / KEPT_WEIGHTS
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): restore it from a copy") from error
        trained = _trained(self.model)
        if {name: value.shape for name, value in weights.items()} != {
            name: parameter.shape for name, parameter in trained.items()
        }:
            raise UserError(f"{path} holds other weights than those that are trained: restore it from a copy")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        self._current = None

    def cleanup_sampling_weights(self) -> None:
        """Do nothing: nothing was written."""

    def _snapshot(self) -> PolicySnapshot:
        return UnshardedSnapshot(self.spec, self.model, self.release)

    def _initial_snapshot(self, model: nn.Module) -> PolicySnapshot:
        return UnshardedSnapshot(self.spec, model, self.release)

    def _read_again(self) -> nn.Module:
        spec = self.spec
        model: nn.Module = loading.load_base_model(
            spec.config, compute_dtype=spec.compute_dtype, device=spec.device
        )
        return model.to(next(self.model.parameters()).dtype)  # doubled under 64-true


@dataclass(eq=False)
class ShardedPolicy(TrainedPolicy):
    """Each process holds a part of every weight.

    Args:
        mesh: the processes.
        workspace: folder that all processes see, made and removed as needed.
    """

    is_sharded = True
    mesh: DeviceMesh
    workspace: Path

    def save(self, folder: Path, *, is_rank0: bool) -> None:
        """Gather the weights one by one, and write them on rank 0."""
        model = sharding.gather_full_model(self.model, self.spec.meta_model, dtype=None)
        if model is not None:
            write_folder(model, self.spec.tokenizer, folder)

    def keep(self, folder: Path, *, is_rank0: bool) -> None:
        """Write a part for each process."""
        sharding.save_shards(_trained(self.model), folder)

    def keeps(self, folder: Path) -> bool:
        """Return whether the parts are there."""
        return (folder / SHARDS_METADATA).is_file()

    def restore(self, folder: Path) -> None:
        """Read what this process holds."""
        sharding.load_shards(_trained(self.model), folder)
        self._current = None  # shards that are overwritten in place count as no change of the whole

    def cleanup_sampling_weights(self) -> None:
        """Remove the workspace."""
        if sharding.is_rank0(self.mesh):
            shutil.rmtree(self.workspace, ignore_errors=True)
        self._current = None  # its weights are no longer there to be sampled from

    def _snapshot(self) -> PolicySnapshot:
        return ShardedSnapshot(self.spec, self.model, self.workspace)

    def _initial_snapshot(self, model: nn.Module) -> PolicySnapshot:
        return ShardedInitialSnapshot(self.spec, model)

    def _read_again(self) -> nn.Module:
        return _load_sharded(self.spec, self.mesh)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_policy(
    spec: PolicySpec,
    mesh: DeviceMesh | None,
    *,
    steps: Callable[[], int],
    release: Callable[[nn.Module], None],
    workspace: Path,
) -> TrainedPolicy:
    """Load the policy to train.

    Args:
        spec: which model; checked.
        mesh: processes to shard the weights over; ``None``: this one holds them all.
        steps: returns the optimizer steps taken so far.
        release: undoes what the training forward does to a model.
        workspace: folder that all processes see, for sharded weights to be sampled through.

    Raises:
        UserError: if the weights cannot be sharded.
    """
    config = spec.config
    if mesh is None:
        model = loading.load_policy(config, compute_dtype=spec.compute_dtype, device=spec.device)
        return UnshardedPolicy(spec, model, steps, release)
    if config.quantization != "none":
        raise UserError(
            f"model.policy.quantization={config.quantization} and trainer.strategy=ModelParallelStrategy do not go "
            "together: quantised weights cannot be sharded over processes; set quantization: none, or use strategy ddp"
        )
    return ShardedPolicy(spec, _load_sharded(spec, mesh), steps, mesh, workspace)


def _load_sharded(spec: PolicySpec, mesh: DeviceMesh) -> nn.Module:
    """Return the policy to train, sharded; rank 0 reads its weights, into host memory."""
    if sharding.is_rank0(mesh):
        model = loading.load_policy(spec.config, compute_dtype=spec.compute_dtype)
    else:
        model = spec.meta_model()
    inner: Any = unwrapped(model)
    inner.generation_config = sharding.broadcast_from_rank0(mesh, inner.generation_config)
    sharding.shard(model, mesh)
    return model
