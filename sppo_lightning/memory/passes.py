"""What the passes of a policy take: run on fake tensors, or by a rule of thumb."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

from sppo_lightning.generation.cache_size import cache_bytes
from sppo_lightning.memory.dry_run import DryRun, cpu_forwards
from sppo_lightning.memory.workload import PairShape, Workload
from sppo_lightning.pair_forward import PairForward
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.footprint import (
    Footprint,
    Gathered,
    gathered,
    largest,
    layer_count,
    loaded_footprint,
    required,
)
from sppo_lightning.types import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")

# a bound: the rule of thumb, which is right to a factor, and what the smallest rows take where layers pad them
GENEROUS, SOME_MORE = 3, 1 << 26
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class Passes(NamedTuple):
    """What the policy's passes take in addition to its weights, in bytes."""

    training: int  # gradients included
    reference: int  # forward only
    reading: int  # of one prompt, to be answered
    row: int  # what is kept of one response and its prompt while it is sampled
    method: str  # how these were found
    measured: bool  # whether the passes were run


class PassMeter:
    """Finds what passes take, once for runs that share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Any] = {}

    def _once(self, key: tuple[object, ...], find: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = find()
        found: T = self._known[key]
        return found

    def weights(self, workload: Workload) -> Footprint:
        """Return what the policy's weights take.

        Raises:
            CannotEstimateError: if the weights are stored in a way that is not known.
            UserError: if the policy's settings do not fit its model.
        """
        policy = workload.policy
        return loaded_footprint(
            self._policy(workload).model,
            workload.model_config,
            policy.quantization,
            double=policy.double_quantization,
        )

    def gathered(self, workload: Workload) -> Gathered:
        """Return what of the policy's weights is gathered at times, where they are sharded."""
        return gathered(self._policy(workload).model)

    def passes(self, workload: Workload) -> Passes:
        """Run the passes on fake tensors; where a model does not run on those, go by a rule of thumb.

        Quantised weights are dequantised one matrix at a time, which a caller has to add.

        Raises:
            CannotEstimateError: if there is no rule for the model either.
        """
        forward = workload.training.pair_forward
        key = (
            *_model_key(workload),
            type(forward),
            forward.chunk,
            workload.shape,
            workload.accumulates,
            workload.prompts.answered,
            workload.longest_row,
            workload.hardware.device.type,
        )
        return self._once(key, lambda: self._found(workload))

    def passes_at_most(self, workload: Workload) -> Passes | None:
        """Return a bound of what the passes take, without running them; ``None`` for layers other than usual attention.

        Raises:
            CannotEstimateError: if there is no rule for the model.
        """
        weights = self.weights(workload)
        about = _by_rule_of_thumb(workload, weights, method="at most, by a generous rule of thumb")
        config: Any = workload.model_config.get_text_config(decoder=True)
        latent = getattr(
            config, "kv_lora_rank", None
        )  # DeepSeek's attention: its settings do not give its keys
        if latent or not set(getattr(config, "layer_types", None) or ()) <= ATTENTION:
            return None
        shape = workload.shape
        # scores of all heads in float32, before and after they are normalised, and masked
        score = 3 * 4 * required(workload.model_config, "num_attention_heads")
        more = SOME_MORE + score * 2 * shape.pairs * (shape.prompt + shape.response) ** 2
        return about._replace(
            training=weights.trained + GENEROUS * (about.training - weights.trained) + more,
            reference=GENEROUS * about.reference + more,
            reading=GENEROUS * about.reading + SOME_MORE + score * workload.prompts.answered**2,
        )

    def _found(self, workload: Workload) -> Passes:
        refusal = ""
        for forward in _forwards(workload):
            found = self._run(workload, forward)
            if isinstance(found, Passes):
                return found
            refusal = found
        method = f"by a rule of thumb, since the model does not run on fake tensors ({refusal})"
        return _by_rule_of_thumb(workload, self.weights(workload), method=method)

    def _run(self, workload: Workload, forward: PairForward) -> Passes | str:
        """Return what the passes take, or the error of a model that does not run."""
        policy, reader = self._policy(workload), _reader(workload)
        torch_log = logging.getLogger("torch._subclasses.fake_tensor")
        level = torch_log.level
        torch_log.setLevel(logging.CRITICAL)  # it logs the traceback of what a fake tensor refuses
        try:
            reading, row = self._once(
                (*_model_key(reader), reader.prompts.answered, reader.longest_row),
                lambda: (
                    self._policy(reader).reading(reader.prompts.answered),
                    self._policy(reader).kept(reader.longest_row),
                ),
            )
            return Passes(
                training=policy.training(forward, workload.shape, accumulates=workload.accumulates),
                reference=policy.scoring(forward, workload.shape),
                reading=reading,
                row=row,
                method=f"{type(forward).__name__}, run on fake tensors",
                measured=True,
            )
        except Exception as error:  # of any architecture's own code
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            torch_log.setLevel(level)

    def _policy(self, workload: Workload) -> DryRun:
        def make() -> DryRun:
            dtype = workload.hardware.compute_dtype
            model = policies.meta_model(workload.policy, workload.model_config, compute_dtype=dtype)
            policies.disable_dropout(model)
            return DryRun(model, compute_dtype=dtype)

        return self._once(_model_key(workload), make)


def _model_key(workload: Workload) -> tuple[object, ...]:
    """Return what tells apart the models that are run: none of them is quantised."""
    policy = replace(workload.policy, quantization="none", double_quantization=True)
    return repr(policy), repr(workload.model_config), workload.hardware.compute_dtype


def _reader(workload: Workload) -> Workload:
    """Return a run whose policy is what answers its prompts: the policy itself, or a copy in the compute dtype."""
    if not workload.samples_a_copy:
        return workload
    dtype: Any = str(workload.hardware.compute_dtype).removeprefix("torch.")
    return replace(workload, policy=replace(workload.policy, dtype=dtype))


def _forwards(workload: Workload) -> list[PairForward]:
    return cpu_forwards(
        workload.training.pair_forward,
        device_type=workload.hardware.device.type,
        vocabulary=vocabulary_of(workload.model_config),
    )


def vocabulary_of(model_config: PretrainedConfig) -> int:
    """Return how many tokens a model's head knows."""
    return int(cast(Any, model_config.get_text_config(decoder=True)).vocab_size)


def rule_of_thumb(
    model_config: PretrainedConfig, shape: PairShape, *, dtype: torch.dtype, checkpointed: bool, chunk: int
) -> int:
    """Return about how many bytes a micro-batch takes besides weights and gradients, where it cannot be run.

    Twenty hidden states and five inner ones a token and layer, as measured of models with gated layers; one of each
    layer and all of one layer under checkpointing; the logits of a chunk in the products' dtype, twice, and once in
    float32.

    Args:
        model_config: transformers' config of a causal language model.
        shape: of the micro-batch; each response is assumed to repeat the prompt.
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


def _by_rule_of_thumb(workload: Workload, weights: Footprint, *, method: str) -> Passes:
    dtype, chunk = workload.hardware.compute_dtype, _forwards(workload)[-1].chunk
    assert chunk is not None

    def about(shape: PairShape, *, checkpointed: bool) -> int:
        return rule_of_thumb(
            workload.model_config, shape, dtype=dtype, checkpointed=checkpointed, chunk=chunk
        )

    return Passes(
        training=about(workload.shape, checkpointed=workload.policy.gradient_checkpointing) + weights.trained,
        reference=about(workload.shape, checkpointed=True),
        reading=about(PairShape(1, workload.prompts.answered, 1), checkpointed=True),
        row=cache_bytes(workload.model_config, workload.longest_row, dtype),
        method=method,
        measured=False,
    )
