"""What decides a run's memory, and what the passes of its policy take."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from sppo_lightning.generation import Generator
from sppo_lightning.generation.cache_size import cache_bytes
from sppo_lightning.memory.dry_run import DryRun, PairShape, stand_ins
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.footprint import (
    Footprint,
    Gathered,
    gathered,
    largest,
    layer_count,
    loaded_footprint,
    required,
)
from sppo_lightning.policy.pretrained import DTYPES
from sppo_lightning.rewards import Reward
from sppo_lightning.training.optimizers import OptimizerFactory
from sppo_lightning.types import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# a bound: the rule of thumb, which is right to a factor, and what the smallest rows take where layers pad them
GENEROUS, SOME_MORE = 3, 1 << 26
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Workload:
    """A run, as far as its memory depends on it.

    Args:
        policy: which model, and how it is held.
        model_config: the model's own settings.
        compute_dtype: dtype of the trainer's matrix products.
        reference: kind of the frozen reference.
        optimizer: makes it; ``None``: the default.
        clips_unscaled: whether gradients are clipped after they were scaled for float16.
        carry_optimizer: whether its state stays while responses are sampled.
        pair_forward: the forward of training.
        generator: answers prompts.
        reward: scores answers.
        batch_size: pairs of a micro-batch on one device.
        pairs_per_step: pairs of an optimizer step, all devices together.
        longest_prompt: tokens of the longest prompt that may be answered, to train on it or not.
        longest_trained_prompt: tokens of the longest prompt that may be trained on; at most ``longest_prompt``.
        device: of the first process.
        processes: that share the run, a device each.
        spread: whether its weights are spread over them (FSDP2), instead of whole on each.
    """

    policy: PolicyConfig
    model_config: PretrainedConfig
    compute_dtype: torch.dtype
    reference: Literal["previous_iteration", "initial"]
    optimizer: OptimizerFactory | None
    clips_unscaled: bool
    carry_optimizer: bool
    pair_forward: PairForward
    generator: Generator
    reward: Reward
    batch_size: int
    pairs_per_step: int
    longest_prompt: int
    longest_trained_prompt: int
    device: torch.device
    processes: int = 1
    spread: bool = False

    @property
    def shards(self) -> int:
        """Parts that the weights lie in."""
        return self.processes if self.spread else 1

    @property
    def shape(self) -> PairShape:
        """The largest micro-batch that may come: responses count twice, so that they are as long as they may be."""
        limit = self.generator.max_total_tokens
        prompt = self.longest_trained_prompt
        if limit is not None:
            prompt = min(prompt, max(1, limit - self.generator.max_new_tokens))
        return PairShape(self.batch_size, prompt, max(1, self.generator.longest_response(prompt)))

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return self.pairs_per_step > self.batch_size * self.processes

    @property
    def samples_a_copy(self) -> bool:
        """Whether responses are sampled from a copy of the policy: its weights are trained in a wider dtype."""
        return self.policy.lora is None and self.weights_dtype != self.compute_dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the weights that full fine-tuning trains."""
        return DTYPES.get(self.policy.dtype, torch.float32)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.longest_prompt + max(1, self.generator.longest_response(self.longest_prompt))

    @property
    def longest_row(self) -> int:
        """Tokens that keys and values of such a response have room for."""
        from sppo_lightning.generation.cache import RESERVE

        return self.longest_sequence + RESERVE


class Passes(NamedTuple):
    """What the policy's passes take beside its weights, in bytes."""

    training: int  # gradients included
    reference: int  # forward only
    reading: int  # of one prompt, to be answered
    row: int  # what is kept of one response and its prompt while it grows
    found: str  # how
    measured: bool  # whether they were run


@dataclass
class PassMeter:
    """Finds what passes take, once for runs that share them."""

    _models: dict[tuple[str, ...], DryRun] = field(default_factory=dict)
    _passes: dict[tuple[Any, ...], Passes] = field(default_factory=dict)
    _reading: dict[tuple[Any, ...], tuple[int, int]] = field(default_factory=dict)

    def weights(self, workload: Workload) -> Footprint:
        """Return what the policy's weights take.

        Raises:
            CannotEstimateError: if the weights are stored in a way that is not known.
            UserError: if the policy's settings do not fit its model.
        """
        policy = workload.policy
        return loaded_footprint(
            self._model(workload).model,
            workload.model_config,
            policy.quantization,
            double=policy.double_quantization,
        )

    def gathered(self, workload: Workload) -> Gathered:
        """Return what of the policy's weights is whole at times, where they are spread."""
        return gathered(self._model(workload).model)

    def passes(self, workload: Workload) -> Passes:
        """Run the passes on tensors without data; where a model does not run on those, go by a rule of thumb.

        Quantised weights are dequantised one matrix at a time, which a caller has to add.

        Raises:
            CannotEstimateError: if there is no rule for the model either.
        """
        forward = workload.pair_forward
        key = (
            _plain(workload),
            type(forward),
            forward.chunk,
            workload.shape,
            workload.accumulates,
            workload.longest_prompt,
            workload.longest_row,
            workload.device.type,
        )
        if key not in self._passes:
            self._passes[key] = self._found(workload)
        return self._passes[key]

    def passes_at_most(self, workload: Workload) -> Passes | None:
        """Return a bound of what the passes take, without running them; ``None`` for layers other than usual attention.

        Raises:
            CannotEstimateError: if there is no rule for the model.
        """
        chunk = self._forwards(workload)[-1].chunk
        assert chunk is not None
        weights = self.weights(workload)
        about = _by_rule_of_thumb(workload, weights, chunk, "")
        config: Any = workload.model_config.get_text_config(decoder=True)
        latent = getattr(
            config, "kv_lora_rank", None
        )  # DeepSeek's attention, whose keys its settings do not tell
        if latent or not set(getattr(config, "layer_types", None) or ()) <= ATTENTION:
            return None
        shape = workload.shape
        # scores of all heads in float32, before and after they are normalised, and masked
        score = 3 * 4 * required(workload.model_config, "num_attention_heads")
        more = SOME_MORE + score * 2 * shape.pairs * (shape.prompt + shape.response) ** 2
        return Passes(
            training=weights.trained + GENEROUS * (about.training - weights.trained) + more,
            reference=GENEROUS * about.reference + more,
            reading=GENEROUS * about.reading + SOME_MORE + score * workload.longest_prompt**2,
            row=about.row,
            found="at most, by a generous rule of thumb",
            measured=False,
        )

    def _forwards(self, workload: Workload) -> list[PairForward]:
        return stand_ins(
            workload.pair_forward,
            device_type=workload.device.type,
            vocabulary=vocabulary_of(workload.model_config),
        )

    def _found(self, workload: Workload) -> Passes:
        forwards = self._forwards(workload)
        refusal = ""
        for forward in forwards:
            found = self._tried(workload, forward)
            if isinstance(found, Passes):
                return found
            refusal = found
        chunk = forwards[-1].chunk
        assert chunk is not None
        return _by_rule_of_thumb(workload, self.weights(workload), chunk, refusal)

    def _tried(self, workload: Workload, forward: PairForward) -> Passes | str:
        """Return what the passes take, or what the model said instead of running."""
        torch_log = logging.getLogger(
            "torch._subclasses.fake_tensor"
        )  # has a traceback for what is tried in vain
        level = torch_log.level
        torch_log.setLevel(logging.CRITICAL)
        try:
            return self._run(workload, forward)
        except Exception as error:  # of any architecture's own code
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            torch_log.setLevel(level)

    def _run(self, workload: Workload, forward: PairForward) -> Passes:
        dry = self._model(workload)
        reading, row = self._read(workload)
        return Passes(
            training=dry.training(forward, workload.shape, accumulates=workload.accumulates),
            reference=dry.scoring(forward, workload.shape),
            reading=reading,
            row=row,
            found=f"{type(forward).__name__}, run on tensors without data",
            measured=True,
        )

    def _read(self, workload: Workload) -> tuple[int, int]:
        """Return what reading a prompt takes, and what is kept of a response; a copy in the compute dtype reads it.

        That is with full fine-tuning; else the policy itself does.
        """
        if workload.samples_a_copy:
            dtype = str(workload.compute_dtype).removeprefix("torch.")
            policy = replace(workload.policy, dtype=dtype)  # type: ignore[arg-type]
            workload = replace(workload, policy=policy)
        key = (_plain(workload), workload.longest_prompt, workload.longest_row)
        if key not in self._reading:
            dry = self._model(workload)
            self._reading[key] = dry.reading(workload.longest_prompt), dry.kept(workload.longest_row)
        return self._reading[key]

    def _model(self, workload: Workload) -> DryRun:
        key = _plain(workload)
        if key not in self._models:
            model = policies.meta_model(
                workload.policy, workload.model_config, compute_dtype=workload.compute_dtype
            )
            policies.disable_dropout(model)
            self._models[key] = DryRun(model, compute_dtype=workload.compute_dtype)
        return self._models[key]


def vocabulary_of(model_config: PretrainedConfig) -> int:
    """Return how many tokens a model's head knows."""
    return int(cast(Any, model_config.get_text_config(decoder=True)).vocab_size)


def rule_of_thumb(
    model_config: PretrainedConfig, shape: PairShape, *, dtype: torch.dtype, checkpointed: bool, chunk: int
) -> int:
    """Return about how many bytes a micro-batch takes beside weights and gradients, where it cannot be run dry.

    Twenty hidden states and five inner ones a token and layer, as measured of models with gated layers; one of each
    layer and all of one layer under checkpointing; the logits of a chunk in the products' dtype, twice, and once in
    float32.

    Args:
        model_config: transformers' config of a causal language model.
        shape: of the micro-batch; each response is taken to have its own copy of the prompt.
        dtype: of the products.
        checkpointed: whether layers are recomputed.
        chunk: positions whose logits exist at once.

    Raises:
        CannotEstimateError: if the model does not say how wide its layers are.
    """
    hidden, inner = required(model_config, "hidden_size"), _inner_size(model_config)
    tokens = 2 * shape.pairs * (shape.prompt + shape.response)
    layer = (20 * hidden + 5 * inner) * tokens * dtype.itemsize
    layers = layer_count(model_config)
    boundary = hidden * tokens * dtype.itemsize
    held = boundary * layers + layer if checkpointed else layer * layers
    positions = min(chunk, 2 * shape.pairs * shape.response)
    return held + positions * vocabulary_of(model_config) * (2 * dtype.itemsize + 4)


def _inner_size(model_config: PretrainedConfig) -> int:
    """Return how many inner numbers a token has in a layer; of a mixture, those of the experts that it goes to."""
    inner = largest(model_config, "moe_intermediate_size") or largest(model_config, "intermediate_size")
    experts = largest(model_config, "num_experts_per_tok") or 1
    return (inner or 4 * required(model_config, "hidden_size")) * experts


def _by_rule_of_thumb(workload: Workload, weights: Footprint, chunk: int, refusal: str) -> Passes:
    def about(shape: PairShape, *, checkpointed: bool) -> int:
        return rule_of_thumb(
            workload.model_config,
            shape,
            dtype=workload.compute_dtype,
            checkpointed=checkpointed,
            chunk=chunk,
        )

    return Passes(
        training=about(workload.shape, checkpointed=workload.policy.gradient_checkpointing) + weights.trained,
        reference=about(workload.shape, checkpointed=True),
        reading=about(PairShape(1, workload.longest_prompt, 1), checkpointed=True),
        row=cache_bytes(workload.model_config, workload.longest_row, workload.compute_dtype),
        measured=False,
        found=f"by a rule of thumb, since the model does not run on tensors without data ({refusal})",
    )


def _plain(workload: Workload) -> tuple[str, ...]:
    """Return what tells the models apart that run dry: none of them is quantised."""
    policy = replace(workload.policy, quantization="none", double_quantization=True)
    return repr(policy), repr(workload.model_config), str(workload.compute_dtype)
