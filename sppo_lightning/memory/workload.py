"""What decides a run's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from sppo_lightning.generation import Generator
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.pretrained import DTYPES
from sppo_lightning.rewards import Reward
from sppo_lightning.training.hardware import Hardware
from sppo_lightning.training.optimizers import OptimizerFactory, clips_unscaled

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PairShape(NamedTuple):
    """A micro-batch of pairs that are all alike."""

    pairs: int
    prompt: int  # tokens
    response: int  # tokens


class TrainingSettings(NamedTuple):
    """How a policy is trained, as far as memory depends on it."""

    pair_forward: PairForward
    reference: Literal["previous_iteration", "initial"]
    optimizer: OptimizerFactory | None  # None: the default
    carry_optimizer: bool  # whether its state stays while responses are sampled
    clips_gradients: bool
    pairs_per_step: int  # of an optimizer step, all devices together
    batch_size: int  # pairs of a micro-batch on one device


class PromptLengths(NamedTuple):
    """Tokens of the longest prompts."""

    answered: int  # that may be answered, to train on them or not
    trained: int  # that may be trained on; at most ``answered``


@dataclass(frozen=True)
class Workload:
    """A run, as far as its memory depends on it.

    Args:
        policy: which model, and how it is held.
        model_config: the model's own settings.
        training: how it is trained.
        generator: answers prompts.
        reward: scores answers.
        prompts: how long they are.
        hardware: what the run computes on.
    """

    policy: PolicyConfig
    model_config: PretrainedConfig
    training: TrainingSettings
    generator: Generator
    reward: Reward
    prompts: PromptLengths
    hardware: Hardware

    @property
    def shape(self) -> PairShape:
        """The largest micro-batch that may come: responses count twice, so that they are as long as they may be."""
        limit = self.generator.max_total_tokens
        prompt = self.prompts.trained
        if limit is not None:
            prompt = min(prompt, max(1, limit - self.generator.max_new_tokens))
        return PairShape(self.training.batch_size, prompt, max(1, self.generator.longest_response(prompt)))

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return self.training.pairs_per_step > self.training.batch_size * self.hardware.processes

    @property
    def clips_unscaled(self) -> bool:
        """Whether gradients are scaled for float16 and clipped."""
        return clips_unscaled(self.hardware.compute_dtype, clips=self.training.clips_gradients)

    @property
    def samples_a_copy(self) -> bool:
        """Whether responses are sampled from a copy of the policy: its weights are trained in a wider dtype."""
        return self.policy.lora is None and self.weights_dtype != self.hardware.compute_dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the weights that full fine-tuning trains."""
        return DTYPES.get(self.policy.dtype, torch.float32)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response together."""
        prompt = self.prompts.answered
        return prompt + max(1, self.generator.longest_response(prompt))

    @property
    def longest_row(self) -> int:
        """Tokens that keys and values of such a response have room for."""
        from sppo_lightning.generation.cache import RESERVE

        return self.longest_sequence + RESERVE
