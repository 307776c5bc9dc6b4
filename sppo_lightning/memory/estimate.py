"""How much device memory each phase of a run will need, from its config and before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from sppo_lightning.memory.dry_run import OptimizerMemory, optimizer_memory
from sppo_lightning.memory.passes import Passes, PassMeter, vocabulary_of
from sppo_lightning.memory.workload import Workload
from sppo_lightning.policy.footprint import CannotEstimateError, Footprint, Gathered, layer_count
from sppo_lightning.rewards.protocol import RewardMemory
from sppo_lightning.system.device_memory import free_bytes

GIB = 2**30
# of CUDA: the context with its kernels; 0.69 GiB on an H100 with those of products, attention and bitsandbytes
CONTEXT_BYTES = int(0.7 * GIB)
# of what tensors take, lost to rounding and to gaps between blocks: on CUDA more than the 1 % of an 8B QLoRA iteration
# whose sequences all had one length; on a CPU what whole processes took beyond the estimate and their imports, 4 to
# 34 % with glibc's malloc, which keeps freed blocks
ALLOCATOR_SHARE = {"cuda": 0.05, "cpu": 0.15}
SAMPLED_LOGITS = 6  # float32 copies of a row's logits while a token is drawn: warped, sorted, summed up

ALLOCATOR, CONTEXT = OVERHEADS = ("allocator", "CUDA context")

PhaseName = Literal["sampling", "scoring", "reference", "training"]


class PhaseNeed(NamedTuple):
    """What a phase takes of the device at its fullest, in bytes."""

    name: PhaseName
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, phase by phase.

    Args:
        phases: in the order of an iteration.
        available: bytes that the run may take.
        rows: responses of the greatest length that grow at once; 0: none of them on this device.
        passes: what the policy's passes take, and how that was found.
        paged: whether the optimizer's states were counted out, since they move to host memory.
    """

    phases: tuple[PhaseNeed, ...]
    available: int
    rows: int
    passes: Passes
    paged: bool = False

    @property
    def fullest(self) -> PhaseNeed:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.fullest.total <= self.available

    def total(self, name: PhaseName) -> int:
        """Return what a phase takes, in bytes."""
        return next(phase.total for phase in self.phases if phase.name == name)

    def table(self) -> str:
        """Return phases and their parts in GiB, for people."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.parts)
        names = dict.fromkeys(sorted(names, key=OVERHEADS.__contains__))
        width = max(map(len, names)) + 2
        lines = ["GiB".ljust(width) + "".join(f"{phase.name:>11}" for phase in self.phases)]
        for name in names:
            cells = (f"{phase.parts[name] / GIB:.2f}" if name in phase.parts else "" for phase in self.phases)
            lines.append(name.ljust(width) + "".join(f"{cell:>11}" for cell in cells))
        lines.append("total".ljust(width) + "".join(f"{phase.total / GIB:>11.2f}" for phase in self.phases))
        verdict = "fits" if self.fits else f"does not fit: {self.fullest.name} needs the most"
        lines.append(f"{self.available / GIB:.2f} GiB available: {verdict}")
        if self.rows:
            lines.append(f"responses of the greatest length that grow at once: {self.rows}")
        else:
            lines.append("responses do not grow in the policy's own memory")
        lines.append(f"activations: {self.passes.method}")
        if self.paged:
            lines.append("optimizer: paged, so that its states move to host memory where the device is full")
        return "\n".join(lines)


def available_bytes(device: torch.device) -> int:
    """Return what a run may take of a device, the CUDA context of this process included."""
    # to ask for it makes the context, which is no longer free then
    return free_bytes(device) + (CONTEXT_BYTES if device.type == "cuda" else 0)


@dataclass
class Estimator:
    """Estimates runs that differ in a few settings; what they share is found once.

    Args:
        available: bytes that a run may take.
    """

    available: int
    _meter: PassMeter = field(default_factory=PassMeter)

    def estimate(self, workload: Workload) -> MemoryEstimate:
        """Return what each phase of a run takes.

        Raises:
            CannotEstimateError: if the config of policy or reward model does not tell.
            UserError: if the policy's settings do not fit its model.
        """
        return self._sum(workload, self._meter.passes(workload))

    def at_most(self, workload: Workload) -> MemoryEstimate | None:
        """Return what each phase takes at most, by a generous rule of thumb: at once, where :meth:`estimate` computes.

        ``None`` for a model that the rule does not know.

        Raises:
            UserError: if the policy's settings do not fit its model.
        """
        try:
            passes = self._meter.passes_at_most(workload)
            return None if passes is None else self._sum(workload, passes)
        except CannotEstimateError:
            return None

    def at_least(self, workload: Workload) -> MemoryEstimate:
        """Return what each phase takes without the policy's passes: at once.

        Raises:
            CannotEstimateError: if the config of policy or reward model does not tell.
            UserError: if the policy's settings do not fit its model.
        """
        weights = self._meter.weights(workload)
        passes = Passes(weights.trained, 0, 0, row=1, method="without the policy's passes", measured=False)
        return self._sum(workload, passes)

    def fits(self, workload: Workload) -> bool:
        """Whether a run fits; no pass is run where all the rest does not."""
        return self.at_least(workload).fits and self.estimate(workload).fits

    def _sum(self, workload: Workload, passes: Passes) -> MemoryEstimate:
        training, hardware = workload.training, workload.hardware
        return _Sum(
            workload,
            self._meter.weights(workload),
            self._meter.gathered(workload) if hardware.sharded else None,
            passes,
            optimizer_memory(
                training.optimizer,
                device_type=hardware.device.type,
                clips_unscaled=workload.clips_unscaled,
            ),
            workload.reward.memory(hardware.device, workload.longest_sequence),
            self.available,
        ).estimate()


@dataclass(frozen=True)
class _Sum:
    """The phases of one run, from what its parts take."""

    workload: Workload
    weights: Footprint
    gathered: Gathered | None  # where weights are sharded
    passes: Passes
    optimizer: OptimizerMemory
    reward: RewardMemory
    available: int

    def estimate(self) -> MemoryEstimate:
        sampling, rows = self._sampling()
        phases = (
            self._phase("sampling", sampling),
            self._phase("scoring", self._scoring(), waiting=0),
            self._phase("reference", self._reference()),
            self._phase("training", self._training()),
        )
        return MemoryEstimate(phases, self.available, rows, self.passes, paged=self.optimizer.paged)

    def _phase(self, name: PhaseName, parts: dict[str, int], waiting: int | None = None) -> PhaseNeed:
        """Add what every phase has, and leave out what takes nothing."""
        held = {"policy": self.weights.weights // self.workload.hardware.shards, **parts}
        held["waiting reward model"] = self.reward.waiting if waiting is None else waiting
        if self.workload.hardware.processes > 1 and not self.workload.hardware.sharded:
            held["DDP's buckets"] = self.weights.trained  # made with its wrapper, before the first sample
        if self.workload.training.carry_optimizer and name != "training":
            held["optimizer"] = self._optimizer_state
        device = self.workload.hardware.device.type
        held[ALLOCATOR] = int(ALLOCATOR_SHARE.get(device, ALLOCATOR_SHARE["cuda"]) * sum(held.values()))
        held[CONTEXT] = CONTEXT_BYTES if device == "cuda" else 0
        return PhaseNeed(name, {part: size for part, size in held.items() if size})

    @property
    def _optimizer_state(self) -> int:
        return int(self.optimizer.state * self.weights.trained_count) // self.workload.hardware.shards

    def _sampling(self) -> tuple[dict[str, int], int]:
        workload, config, row = self.workload, self.workload.model_config, self.passes.row
        copy = self._copy
        free = self.available - self._phase("sampling", {"copy": copy}).total
        engine = workload.generator.memory(
            row, free=max(0, free), total=self.available, device=workload.hardware.device
        )
        # a layer's buffer is filled from its last one when it grows
        growing = row + row // max(1, layer_count(config)) + 4 * SAMPLED_LOGITS * vocabulary_of(config)
        parts = {
            "copy to sample from": copy if engine.copies else 0,
            "engine": engine.reserved,
            "one response": max(self.passes.reading + self.weights.widest, growing) if engine.rows else 0,
        }
        return parts, engine.rows

    @property
    def _copy(self) -> int:
        """Bytes of the policy that responses are sampled from, in addition to the one that is trained."""
        workload, weights = self.workload, self.weights
        if not workload.samples_a_copy:
            return weights.weights if workload.hardware.sharded else 0
        copied = (weights.trained_count + weights.frozen_count) * workload.hardware.compute_dtype.itemsize
        return copied + self._buffers if workload.hardware.sharded else copied

    @property
    def _buffers(self) -> int:
        """Bytes of a policy without an adapter that are no weights."""
        return self.weights.frozen - self.weights.frozen_count * self.workload.weights_dtype.itemsize

    def _scoring(self) -> dict[str, int]:
        return {"reward model": self.reward.weights, "one conversation": self.reward.conversation}

    def _reference(self) -> dict[str, int]:
        again = 0
        policy = self.workload.policy
        if self.workload.training.reference == "initial" and (
            policy.lora is None or policy.lora.adapter is not None
        ):
            held = self.weights.trained
            if policy.lora is None:  # what was not trained is read again, too
                held += self.weights.frozen_count * self.workload.weights_dtype.itemsize
            again = held // self.workload.hardware.shards
        parts = {"initial weights": again, "activations": self.passes.reference + self.weights.widest}
        return parts if self.gathered is None else {**parts, "gathered weights": self.gathered.reading}

    def _training(self) -> dict[str, int]:
        weights = self.weights
        step = int(self.optimizer.step * weights.trained_count) // self.workload.hardware.shards
        parts = {
            "gradients": weights.trained // self.workload.hardware.shards,
            "optimizer": self._optimizer_state,
            # backward and the optimizer's step follow each other
            "activations": max(self.passes.training - weights.trained + weights.widest, step),
        }
        return parts if self.gathered is None else {**parts, "gathered weights": self.gathered.training}
