"""Which settings let a run fit into the memory there is: found by estimating again with each of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple, cast

from torch.optim import Optimizer

from sppo_lightning.generation import (
    Generator,
    OffPolicy,
    OpenAIServerGenerator,
    VLLMAdapter,
    VLLMGenerator,
)
from sppo_lightning.memory.estimate import GIB, Estimator, MemoryEstimate
from sppo_lightning.memory.workload import PromptLengths, Workload
from sppo_lightning.policy.config import LoRAConfig

WORTHWHILE = 0.99  # of what a phase lacks; settings that leave more are not proposed
SMALL_RANK = 16
SMALL_CHUNK = 256  # positions whose logits exist at once
SHORTEST = 128  # tokens; shorter prompts or responses are not proposed


class Change(NamedTuple):
    """Settings that may help, and the run with them."""

    settings: Mapping[str, object]  # values by key of the config
    workload: Workload


def diagnosis(estimator: Estimator, workload: Workload, estimate: MemoryEstimate) -> str | None:
    """Return in one line why a run does not fit, and which settings would let it; ``None`` if it fits.

    Args:
        estimator: which made the estimate.
        workload: the run.
        estimate: of it.
    """
    if estimate.fits:
        return None
    phase = estimate.fullest
    return (
        f"{phase.name} needs about {phase.total / GIB:.1f} GiB, but {workload.hardware.device} has "
        f"{estimate.available / GIB:.1f} GiB: {suggestion(estimator, workload)}"
    )


def suggestion(estimator: Estimator, workload: Workload) -> str:
    """Return settings that let a run fit which does not.

    The first of :func:`changes` that makes the fullest phase smaller is taken, then the first that does so with it,
    until every phase fits: first without the policy's passes, which is at once, then with them. Of these settings the
    ones without which the run fits all the same are left out.
    """
    run = workload
    taken: list[Mapping[str, object]] = []
    for measure in (estimator.at_least, estimator.estimate):
        estimate = measure(run)
        while not estimate.fits:
            found = _first_that_helps(run, estimate, measure)
            if found is None:
                return _nothing_helps(taken, estimator.estimate(run))
            (settings, run), estimate = found
            taken.append(settings)
    for settings in list(taken):
        fewer = [other for other in taken if other is not settings]
        if estimator.fits(_changed(workload, fewer)):
            taken = fewer
    return f"set {_listed(taken)}"


def _first_that_helps(
    run: Workload, estimate: MemoryEstimate, measure: Callable[[Workload], MemoryEstimate]
) -> tuple[Change, MemoryEstimate] | None:
    phase, available = estimate.fullest, estimate.available
    enough = available + WORTHWHILE * (phase.total - available)
    found = ((change, measure(change.workload)) for change in changes(run))
    return next(((change, after) for change, after in found if after.total(phase.name) <= enough), None)


def _changed(workload: Workload, taken: Sequence[Mapping[str, object]]) -> Workload:
    """Return a run with some settings changed, and without those that only serve others, e.g. to serve shards."""
    for settings in taken:
        found = (change.workload for change in changes(workload) if change.settings == settings)
        workload = next(found, workload)
    return workload


def _nothing_helps(taken: Sequence[Mapping[str, object]], estimate: MemoryEstimate) -> str:
    instead = "use a smaller model or a larger device"
    if not taken:
        return f"no setting changes that; {instead}"
    phase = estimate.fullest
    reached = f"{phase.name} still needs about {phase.total / GIB:.1f} GiB"
    return f"no settings suffice: with {_listed(taken)} {reached}; {instead}"


def _listed(taken: Sequence[Mapping[str, object]]) -> str:
    """Return settings as ``key=value``; where one was changed several times, its last value."""
    values = dict(chain.from_iterable(settings.items() for settings in taken))
    return " and ".join(f"{key}={value}" for key, value in values.items())


# -------------------------------------------------------------- candidates


def changes(workload: Workload) -> Iterator[Change]:
    """Yield what may let a run fit: what changes no result comes first, what changes the data last."""
    yield from smaller_batches(workload)
    yield from checkpointing(workload)
    yield from smaller_chunks(workload)
    yield from smaller_rewards(workload)
    yield from sharding(workload)
    yield from serving(workload)
    yield from paged_optimizer(workload)
    yield from adapters(workload)
    yield from quantization(workload)
    yield from smaller_ranks(workload)
    yield from shorter_responses(workload)
    yield from shorter_prompts(workload)


def smaller_batches(workload: Workload) -> Iterator[Change]:
    """Fewer pairs at once: the same steps, in more passes."""
    training = workload.training
    for size in _halves(training.batch_size, least=1):
        if training.pairs_per_step % (size * workload.hardware.processes) == 0:
            smaller = training._replace(batch_size=size)
            yield Change({"data.batch_size": size}, replace(workload, training=smaller))


def checkpointing(workload: Workload) -> Iterator[Change]:
    """Recompute activations: the same numbers, about a third slower."""
    if not workload.policy.gradient_checkpointing:
        policy = replace(workload.policy, gradient_checkpointing=True)
        yield Change({"model.policy.gradient_checkpointing": "true"}, replace(workload, policy=policy))


def smaller_chunks(workload: Workload) -> Iterator[Change]:
    """Fewer logits at once: the same numbers, some of them computed twice."""
    forward = copy.copy(workload.training.pair_forward)
    if forward.chunk is None or forward.chunk > SMALL_CHUNK:
        forward.chunk = SMALL_CHUNK
        key = "model.pair_forward"
        settings = {key: _class_path(type(forward)), f"{key}.init_args.chunk": SMALL_CHUNK}
        yield Change(settings, replace(workload, training=workload.training._replace(pair_forward=forward)))


def smaller_rewards(workload: Workload) -> Iterator[Change]:
    """Settings of the reward's own: rewards that differ by rounding, or are read again each time."""
    for setting, reward in workload.reward.smaller().items():
        key, value = setting.split("=", 1)
        yield Change({f"data.reward.{key}": value}, replace(workload, reward=reward))


def sharding(workload: Workload) -> Iterator[Change]:
    """Shard the policy's weights over the processes that there are: the same numbers, more traffic between them."""
    hardware = workload.hardware
    if hardware.processes > 1 and not hardware.sharded and workload.policy.quantization == "none":
        key = "trainer.strategy"
        settings = {
            key: "lightning.pytorch.strategies.ModelParallelStrategy",
            f"{key}.init_args.data_parallel_size": hardware.processes,
            f"{key}.init_args.tensor_parallel_size": 1,
        }
        yield Change(settings, replace(workload, hardware=hardware._replace(sharded=True)))


def serving(workload: Workload) -> Iterator[Change]:
    """Sample elsewhere where a process cannot hold the full policy in the compute dtype."""
    generator = workload.generator
    if workload.hardware.sharded and not isinstance(generator, OpenAIServerGenerator):
        server = OpenAIServerGenerator(
            "http://localhost:8000/v1",
            OffPolicy(),
            "policy",
            max_new_tokens=generator.max_new_tokens,
            temperature=generator.temperature,
        )
        value = "sppo_lightning.generation.OpenAIServerGenerator with a server, such as vLLM, on devices of its own"
        yield Change({"data.generator": value}, replace(workload, generator=server))


def paged_optimizer(workload: Workload) -> Iterator[Change]:
    """Keep Adam's states in 8 bits, and in host memory where the device is full."""
    if not workload.hardware.sharded and find_spec("bitsandbytes") is not None:
        training = workload.training._replace(optimizer=_paged_adamw)
        settings = {"model.optimizer": "bitsandbytes.optim.PagedAdamW8bit"}
        yield Change(settings, replace(workload, training=training))


def adapters(workload: Workload) -> Iterator[Change]:
    """Train an adapter instead of all weights."""
    if workload.policy.lora is None and _serves(workload.generator, adapter=True):
        yield _with_rank(workload, LoRAConfig(rank=SMALL_RANK, alpha=2.0 * SMALL_RANK))


def quantization(workload: Workload) -> Iterator[Change]:
    """Hold the frozen base of an adapter in four bits."""
    serves = _serves(workload.generator, adapter=False) and not workload.hardware.sharded
    there = find_spec("bitsandbytes") is not None
    if there and workload.policy.lora is not None and workload.policy.quantization != "nf4" and serves:
        policy = replace(workload.policy, quantization="nf4")
        yield Change({"model.policy.quantization": "nf4"}, replace(workload, policy=policy))


def smaller_ranks(workload: Workload) -> Iterator[Change]:
    """Train a smaller adapter, scaled alike."""
    lora = workload.policy.lora
    if lora is not None and lora.rank is not None and lora.alpha is not None and lora.rank > SMALL_RANK:
        power = 0.5 if lora.rslora else 1.0
        alpha = round(lora.alpha * (SMALL_RANK / lora.rank) ** power, 4)
        yield _with_rank(workload, replace(lora, rank=SMALL_RANK, alpha=alpha))


def shorter_responses(workload: Workload) -> Iterator[Change]:
    """Sample fewer tokens."""
    for tokens in _halves(workload.generator.max_new_tokens, least=SHORTEST):
        generator = copy.copy(workload.generator)
        generator.max_new_tokens = tokens
        settings = {"data.generator.init_args.max_new_tokens": tokens}
        yield Change(settings, replace(workload, generator=generator))


def shorter_prompts(workload: Workload) -> Iterator[Change]:
    """Leave out the longest prompts."""
    for tokens in _halves(workload.prompts.answered, least=SHORTEST):
        prompts = PromptLengths(tokens, min(tokens, workload.prompts.trained))
        yield Change({"data.max_prompt_tokens": tokens}, replace(workload, prompts=prompts))


def _halves(size: int, *, least: int) -> Iterator[int]:
    while (size := size // 2) >= least:
        yield size


def _with_rank(workload: Workload, lora: LoRAConfig) -> Change:
    settings = {"model.policy.lora.rank": lora.rank, "model.policy.lora.alpha": f"{lora.alpha:g}"}
    return Change(settings, replace(workload, policy=replace(workload.policy, lora=lora)))


def _class_path(kind: type) -> str:
    """Return the path of a class as a config names it: in its package, if that exports it."""
    package = kind.__module__.rpartition(".")[0]
    exported = getattr(sys.modules.get(package), kind.__name__, None) is kind
    return f"{package if exported else kind.__module__}.{kind.__name__}"


def _serves(generator: Generator, *, adapter: bool) -> bool:
    """Whether an engine can sample a policy with an adapter, or on a quantised base."""
    if isinstance(generator, OpenAIServerGenerator):
        return isinstance(generator.weight_sync, (VLLMAdapter, OffPolicy) if adapter else OffPolicy)
    return adapter or not isinstance(generator, VLLMGenerator)


def _paged_adamw(groups: Iterable[Any]) -> Optimizer:
    from bitsandbytes import optim

    optimizer: Optimizer = cast(Any, optim).PagedAdamW8bit(groups)
    return optimizer
