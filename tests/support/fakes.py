"""Generators, rewards and processes that count or echo, and a collector of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sppo_lightning.generation import (
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.rollouts.requests import RolloutRequest
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import (
    EncodedPrompt,
    PhaseProgress,
    Prompt,
    Ranks,
    Response,
    Rollout,
)


@dataclass
class Alone:
    """The only process, or one of several that run one after the other."""

    rank: int = 0
    world_size: int = 1

    def barrier(self, name: str) -> None: ...

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values]

    def check(self) -> None: ...


@dataclass
class Threads:
    """Processes that wait for each other, as threads."""

    rank: int
    world_size: int
    meeting: threading.Barrier

    def barrier(self, name: str) -> None:
        self.meeting.wait(timeout=20)

    def gather(self, values: list[Any]) -> list[list[Any]]:
        raise NotImplementedError

    def check(self) -> None: ...


@dataclass
class Echo(Generator):
    """A deterministic engine: says the policy's level and the seed, answers in reverse order."""

    fail_at: int = -1  # call of `generate` that breaks down
    events: list[str] = field(default_factory=list)
    asked: list[SampleRequest] = field(default_factory=list)
    calls: int = 0

    def load(self, policy: PolicySource) -> None:
        self.events.append("load")
        self.level = int(getattr(policy, "level", 0))

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise RuntimeError("out of memory")
        self.events.append("generate")
        self.asked += requests
        for index in reversed(range(len(requests))):
            request = requests[index]
            yield PromptResponses(
                index, [self.response(request.token_ids, seed) for seed in request.seeds or (0,)]
            )

    def response(self, prompt: tuple[int, ...], seed: int) -> Response:
        ids = (*prompt, self.level, seed % 1000)
        return Response(ids, f"level {self.level} seed {seed}", "stop" if seed % 2 else "length")

    def unload(self) -> None:
        self.events.append("unload")


def with_settings(engine: Echo, **settings: Any) -> Echo:
    """Give an engine what each has, and it makes no use of."""
    known = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": None}
    for name, value in {**known, "max_total_tokens": None, **settings}.items():
        setattr(engine, name, value)
    return engine


@dataclass
class Digits(Reward):
    """Rewards the last digit; shares its record of events with the engine."""

    fail_at: int = -1
    events: list[str] = field(default_factory=list)
    calls: int = 0
    scored: int = 0

    def load(self, device: torch.device) -> None:
        self.events.append(f"load reward on {device}")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise KeyboardInterrupt
        self.events.append("score")
        self.scored += len(responses)
        return [float(response[-1]) if response[-1] != "7" else math.nan for response in responses]

    def unload(self) -> None:
        self.events.append("unload reward")


def encoded(count: int, start: int = 0) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(Prompt(f"p{number}", f"text {number}", ()), (number, number + 1))
        for number in range(start, start + count)
    ]


def wanted_of(count: int, samples: range = range(2)) -> list[RolloutRequest]:
    return [RolloutRequest(prompt, samples) for prompt in encoded(count)]


class Unsampled:
    """A policy that the engines of these tests do not ask."""

    embedding_rows = 2**31

    def fingerprint(self) -> str:
        return "unsampled"

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        pass


UNSAMPLED: Any = Unsampled()


def collector(
    generator: Generator | None = None,
    reward: Reward | None = None,
    *,
    ranks: Ranks | None = None,
    prompts_per_shard: int = 2,
    report: Callable[[PhaseProgress], None] = lambda progress: None,
    seed: int = 5,
) -> Collector:
    return Collector(
        generator=generator or Echo(),
        reward=reward or Digits(),
        device=torch.device("cpu"),
        seed=seed,
        prompts_per_shard=prompts_per_shard,
        ranks=ranks or Alone(),
        report=report,
    )


def same(left: Sequence[Rollout], right: Sequence[Rollout]) -> bool:
    """Equality, with NaN equal to NaN."""
    return repr(list(left)) == repr(list(right))


def files(store: ShardStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


def together(run: Callable[[int], None], world_size: int) -> None:
    """Run once a rank, at the same time."""
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
