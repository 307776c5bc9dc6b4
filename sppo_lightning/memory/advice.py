"""Which settings let a run fit into the memory there is: found by estimating again with each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
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
from sppo_lightning.memory.workload import Workload
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.rewards import Reward
from sppo_lightning.rewards.protocol import RewardMemory

SUGGESTED = 3  # settings, of which one is enough
WORTHWHILE = 0.99  # of what is lacking; a setting that leaves more is not proposed
SMALL_RANK = 16
SMALL_CHUNK = 256  # positions whose logits exist at once
SHORTEST = 128  # tokens; shorter prompts or responses are not proposed


class Remedy(NamedTuple):
    """A setting that may help."""

    setting: str  # keys of the config with their values
    workload: Workload  # with the setting


Ladder = Callable[[Workload], Iterable[Remedy]]
"""Values of one setting for a run, mildest first; none where it does not apply."""


def smaller_batches(workload: Workload) -> Iterator[Remedy]:
    """Fewer pairs at once: the same steps, in more passes."""
    size = workload.batch_size // 2
    while size:
        if workload.pairs_per_step % (size * workload.processes) == 0:
            yield Remedy(f"data.batch_size={size}", replace(workload, batch_size=size))
        size //= 2


def checkpointing(workload: Workload) -> Iterator[Remedy]:
    """Recompute activations: the same numbers, about a third slower."""
    if not workload.policy.gradient_checkpointing:
        yield _with_policy(workload, "gradient_checkpointing=true", gradient_checkpointing=True)


def smaller_chunks(workload: Workload) -> Iterator[Remedy]:
    """Fewer logits at once: the same numbers, some of them computed twice."""
    forward = copy.copy(workload.pair_forward)
    if forward.chunk is None or forward.chunk > SMALL_CHUNK:
        forward.chunk = SMALL_CHUNK
        kind = type(forward)
        setting = (
            f"model.pair_forward={kind.__module__}.{kind.__qualname__} with init_args.chunk={SMALL_CHUNK}"
        )
        yield Remedy(setting, replace(workload, pair_forward=forward))


def smaller_rewards(workload: Workload) -> list[Ladder]:
    """Return the ladders of a reward's own settings: those that change what it takes of the device."""

    def taken(reward: Reward) -> RewardMemory:
        return reward.memory(workload.device, workload.longest_sequence)

    usual = taken(workload.reward)
    smaller = workload.reward.smaller()
    return [
        partial(_smaller_reward, setting) for setting, reward in smaller.items() if taken(reward) != usual
    ]


def _smaller_reward(setting: str, workload: Workload) -> Iterator[Remedy]:
    reward = workload.reward.smaller().get(setting)
    if reward is not None:
        yield Remedy(f"data.reward.{setting}", replace(workload, reward=reward))


def spreading(workload: Workload) -> Iterator[Remedy]:
    """Spread the policy's weights over the processes that there are: the same numbers, more traffic between them."""
    if workload.processes > 1 and not workload.spread and workload.policy.quantization == "none":
        setting = (
            "trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy with "
            f"init_args.data_parallel_size={workload.processes} and init_args.tensor_parallel_size=1"
        )
        yield Remedy(setting, replace(workload, spread=True))


def serving(workload: Workload) -> Iterator[Remedy]:
    """Sample elsewhere where a process cannot hold the whole policy in the compute dtype."""
    if workload.spread and not isinstance(workload.generator, OpenAIServerGenerator):
        tokens, temperature = workload.generator.max_new_tokens, workload.generator.temperature
        server = OpenAIServerGenerator(
            "http://localhost:8000/v1", OffPolicy(), "policy", max_new_tokens=tokens, temperature=temperature
        )
        setting = (
            "data.generator=sppo_lightning.generation.OpenAIServerGenerator with a server, such as vLLM, on devices of "
            "its own"
        )
        yield Remedy(setting, replace(workload, generator=server))


def paged_optimizer(workload: Workload) -> Iterator[Remedy]:
    """Keep Adam's states in 8 bits, and in host memory where the device is full."""
    if not workload.spread and find_spec("bitsandbytes") is not None:
        setting = "model.optimizer=bitsandbytes.optim.PagedAdamW8bit"
        yield Remedy(setting, replace(workload, optimizer=_paged_adamw))


def adapters(workload: Workload) -> Iterator[Remedy]:
    """Train an adapter instead of all weights."""
    if workload.policy.lora is None and _serves(workload.generator, adapter=True):
        lora = LoRAConfig(rank=SMALL_RANK, alpha=2.0 * SMALL_RANK)
        setting = f"lora.rank={SMALL_RANK} with model.policy.lora.alpha={2 * SMALL_RANK}"
        yield _with_policy(workload, setting, lora=lora)


def quantization(workload: Workload) -> Iterator[Remedy]:
    """Hold the frozen base of an adapter in four bits."""
    serves = _serves(workload.generator, adapter=False) and not workload.spread
    there = find_spec("bitsandbytes") is not None
    if there and workload.policy.lora is not None and workload.policy.quantization != "nf4" and serves:
        yield _with_policy(workload, "quantization=nf4", quantization="nf4")


def smaller_ranks(workload: Workload) -> Iterator[Remedy]:
    """Train a smaller adapter, scaled alike."""
    lora = workload.policy.lora
    if lora is not None and lora.rank is not None and lora.alpha is not None and lora.rank > SMALL_RANK:
        power = 0.5 if lora.rslora else 1.0
        alpha = round(lora.alpha * (SMALL_RANK / lora.rank) ** power, 4)
        setting = f"lora.rank={SMALL_RANK} with model.policy.lora.alpha={alpha:g}"
        yield _with_policy(workload, setting, lora=replace(lora, rank=SMALL_RANK, alpha=alpha))


def shorter_responses(workload: Workload) -> Iterator[Remedy]:
    """Sample fewer tokens."""
    tokens = workload.generator.max_new_tokens // 2
    while tokens >= SHORTEST:
        generator = copy.copy(workload.generator)
        generator.max_new_tokens = tokens
        setting = f"data.generator.init_args.max_new_tokens={tokens}"
        yield Remedy(setting, replace(workload, generator=generator))
        tokens //= 2


def shorter_prompts(workload: Workload) -> Iterator[Remedy]:
    """Leave out the longest prompts."""
    tokens = workload.longest_prompt // 2
    while tokens >= SHORTEST:
        trained = min(tokens, workload.longest_trained_prompt)
        shorter = replace(workload, longest_prompt=tokens, longest_trained_prompt=trained)
        yield Remedy(f"data.max_prompt_tokens={tokens}", shorter)
        tokens //= 2


def ladders(workload: Workload) -> list[Ladder]:
    """Return the ladders of a run: what changes no result comes first, what changes the data last."""
    return [
        *(smaller_batches, checkpointing, smaller_chunks),
        *smaller_rewards(workload),
        *(spreading, serving),
        *(paged_optimizer, adapters, quantization, smaller_ranks),
        *(shorter_responses, shorter_prompts),
    ]


def verdict(estimator: Estimator, workload: Workload, estimate: MemoryEstimate) -> str | None:
    """Return in one line why a run does not fit, and which settings would let it; ``None`` if it fits.

    Args:
        estimator: which made the estimate.
        workload: the run.
        estimate: of it.
    """
    if estimate.fits:
        return None
    phase = estimate.fullest
    needs = (
        f"{phase.name} needs about {phase.total / GIB:.1f} GiB, but {workload.device} has "
        f"{estimate.available / GIB:.1f} GiB"
    )
    return f"{needs}: {advice(estimator, workload, estimate)}"


def advice(estimator: Estimator, workload: Workload, estimate: MemoryEstimate) -> str:
    """Return the settings that let a run fit which does not: one of up to three, else several together."""
    enough = list(_single(estimator, workload))
    if enough:
        return f"set {' or '.join(remedy.setting for remedy in enough)}"
    return _together(estimator, workload, estimate)


def _single(estimator: Estimator, workload: Workload) -> Iterator[Remedy]:
    """Yield settings that suffice alone, each at the mildest value that does."""
    found = 0
    for ladder in ladders(workload):
        steps = list(ladder(workload))
        if found < SUGGESTED and steps and estimator.fits(steps[-1].workload):
            yield next(step for step in steps if estimator.fits(step.workload))
            found += 1


def _together(estimator: Estimator, workload: Workload, estimate: MemoryEstimate) -> str:
    """Add one setting to the other until all fits, then leave out what is not needed."""
    taken: list[Ladder] = []
    least = estimate
    for ladder in ladders(workload):
        tried = _applied(workload, [*taken, ladder])
        found = estimator.estimate(tried.workload)
        if _nearer(found, least):
            taken.append(ladder)
            least = found
        if least.fits:
            break
    if not least.fits:
        settings = _applied(workload, taken).setting
        phase = least.fullest
        reached = f"{phase.name} still needs about {phase.total / GIB:.1f} GiB"
        if not settings:
            return "no setting changes that; use a smaller model or a larger device"
        return f"no settings suffice: with {settings} {reached}; use a smaller model or a larger device"
    for ladder in list(taken):
        without = [other for other in taken if other is not ladder]
        if estimator.fits(_applied(workload, without).workload):
            taken = without
    before = _applied(workload, taken[:-1])
    last = next(step for step in taken[-1](before.workload) if estimator.fits(step.workload))
    return f"set {' and '.join(setting for setting in (before.setting, last.setting) if setting)}"


def _applied(workload: Workload, chosen: Sequence[Ladder]) -> Remedy:
    """Return a run with the strongest value of each ladder's setting, and all of these settings."""
    settings = []
    for ladder in chosen:
        steps = list(ladder(workload))
        if steps:
            settings.append(steps[-1].setting)
            workload = steps[-1].workload
    return Remedy(" and ".join(settings), workload)


def _serves(generator: Generator, *, adapter: bool) -> bool:
    """Whether an engine can sample a policy with an adapter, or on a quantised base."""
    if isinstance(generator, OpenAIServerGenerator):
        return isinstance(generator.weight_sync, (VLLMAdapter, OffPolicy) if adapter else OffPolicy)
    return adapter or not isinstance(generator, VLLMGenerator)


def _nearer(found: MemoryEstimate, least: MemoryEstimate) -> bool:
    """Whether clearly fewer bytes are lacking, all phases together."""

    def lacking(estimate: MemoryEstimate) -> int:
        return sum(max(0, phase.total - estimate.available) for phase in estimate.phases)

    return lacking(found) <= WORTHWHILE * lacking(least)


def _with_policy(workload: Workload, setting: str, **changes: Any) -> Remedy:
    policy: PolicyConfig = replace(workload.policy, **changes)
    return Remedy(f"model.policy.{setting}", replace(workload, policy=policy))


def _paged_adamw(groups: Iterable[Any]) -> Optimizer:
    from bitsandbytes import optim

    optimizer: Optimizer = cast(Any, optim).PagedAdamW8bit(groups)
    return optimizer
