"""How many prompts a rollout file holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import UNSAMPLED

from sppo_lightning.generation import Generator, PolicySource, PromptResponses, SampleRequest
from sppo_lightning.rewards import FunctionReward
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.rollouts.requests import RolloutRequests
from sppo_lightning.rollouts.shard_size import prompts_per_shard
from sppo_lightning.store.shards import ShardStore, read_rollouts
from sppo_lightning.types import EncodedPrompt, Prompt, Response, T, UserError


@pytest.mark.parametrize(
    ("prompts", "samples", "max_new_tokens", "expected"),
    [
        (1, 1, 64, 128),  # one shard, whatever it may hold
        (200, 2, 128, 64),  # 400 responses: 128 of them fill a batch, 20 do not
        (10_000, 8, 256, 35),  # 80,000: 282 responses each, 286 shards
        (100_000, 8, 512, 111),  # 800,000: 894 responses each, 901 shards
        (1_000_000, 8, 1024, 256),  # 8 million: 2,048 responses each, 3,907 shards
        (100_000, 8, 32_768, 8),  # 2 million tokens are 64 of the longest responses
        (1_000, 200, 4_000_000, 1),  # never less than one prompt
    ],
)
def test_golden(prompts: int, samples: int, max_new_tokens: int, expected: int) -> None:
    """A run goes on with the shards that it began with, so that another number here breaks runs under way."""
    assert prompts_per_shard(prompts, samples, max_new_tokens=max_new_tokens) == expected


@given(prompts=st.integers(1, 1_000_000), samples=st.integers(1, 8), max_new_tokens=st.integers(1, 1024))
def test_neither_too_many_nor_too_large(prompts: int, samples: int, max_new_tokens: int) -> None:
    size = prompts_per_shard(prompts, samples, max_new_tokens=max_new_tokens)
    assert 120 < (size * samples) <= 2048
    assert size * samples * max_new_tokens <= 2**21
    assert math.ceil(prompts / size) < 4000


@dataclass
class Instant(Generator):
    """Answers at once."""

    max_new_tokens: int = 8

    def load(self, policy: PolicySource) -> None: ...

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        for index, request in enumerate(requests):
            yield PromptResponses(index, [Response((5, 1), "text", "stop")] * len(request.seeds))

    def unload(self) -> None: ...


@dataclass
class Process:
    """One of several that run one after the other."""

    rank: int
    world_size: int

    def barrier(self, name: str) -> None: ...

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values]

    def same(self, value: T) -> T:
        return value

    def check(self) -> None: ...


def test_the_number_of_processes_changes_no_border(tmp_path: Path) -> None:
    """2,100 responses: 128 a shard, which are 42 prompts of 3; a start with one process goes on with two."""
    prompts = [EncodedPrompt(Prompt(f"p{number}", "Q", ()), (7,)) for number in range(700)]
    wanted = RolloutRequests(prompts, [range(1, 4) if number else range(2) for number in range(700)])
    store = ShardStore(tmp_path)

    def collect(*ranks: Process) -> dict[str, list[str]]:
        for rank in ranks:
            collector = Collector(
                generator=Instant(),
                reward=FunctionReward(lambda prompts, responses, metadata: [1.0] * len(responses)),
                device=torch.device("cpu"),
                seed=0,
                prompts_per_shard=None,
                ranks=rank,
                report=lambda progress: None,
            )
            # a rank that goes first does not find the others' shards yet
            with contextlib.suppress(UserError):
                collector.collect(store, "probe", wanted, policy=UNSAMPLED, iteration=0, phase="probing")
        names = sorted(tmp_path.iterdir())
        return {name.name: [row.prompt_id for row in read_rollouts(name)] for name in names}

    alone = collect(Process(0, 1))
    assert [len(set(ids)) for ids in alone.values()] == [42] * 16 + [28]
    for path in list(tmp_path.iterdir())[::2]:
        path.unlink()
    assert collect(Process(0, 2), Process(1, 2)) == alone
