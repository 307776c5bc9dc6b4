"""An engine that samples from tiny models, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from support.tiny import END, VOCABULARY, Source, random_tokens
from torch import nn

from sppo_lightning.generation import HFGenerator, PolicySource, SampleRequest
from sppo_lightning.types import Response

LONGEST = 12


PROMPTS = random_tokens(3, 1, 40, 17)  # over and under the sliding windows of 6


NEVER = frozenset({VOCABULARY})  # no token


STATEFUL = ("qwen3_5", "lfm2", "falcon_h1", "granite_hybrid", "mamba2")  # layers keep a state instead of keys


def engine(policy: PolicySource, **settings: Any) -> HFGenerator:
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    return generator


def answer(generator: HFGenerator, requests: Sequence[SampleRequest]) -> list[list[Response]]:
    """Answer requests; the result is in request order."""
    answers = list(generator.generate(requests))
    assert sorted(one.request for one in answers) == list(range(len(requests)))
    return [one.responses for one in sorted(answers, key=lambda one: one.request)]


def greedy(source: Source, prompts: Sequence[tuple[int, ...]], **settings: Any) -> list[Response]:
    requests = [SampleRequest(prompt, ()) for prompt in prompts]
    return [one for (one,) in answer(engine(source, **settings), requests)]


def sampled(
    source: Source, requests: Sequence[SampleRequest], **settings: Any
) -> dict[tuple[tuple[int, ...], int], tuple[int, ...]]:
    """Token ids by prompt and seed."""
    return by_seed(requests, answer(engine(source, **settings), requests))


def by_seed(
    requests: Sequence[SampleRequest], answers: Sequence[Sequence[Response]]
) -> dict[tuple[tuple[int, ...], int], tuple[int, ...]]:
    """Token ids by prompt and seed."""
    return {
        (request.token_ids, seed): response.token_ids
        for request, responses in zip(requests, answers, strict=True)
        for seed, response in zip(request.seeds, responses, strict=True)
    }


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Record rows and tokens of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        shapes.append((rows, tokens))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    yield shapes
    handle.remove()


REQUESTS = [
    SampleRequest(prompt, tuple(range(100 * number, 100 * number + 3)))
    for number, prompt in enumerate(random_tokens(2, 30, 7, 7, 1, 19, 4, 11, seed=1))
]


EARLY = frozenset(range(END, 259, 6))  # one token in six ends a response


GROUPS = [
    SampleRequest(prompt, tuple(range(10 * number, 10 * number + 5)))
    for number, prompt in enumerate(random_tokens(3, 25, 8, 14, 4, 9, seed=7))
]
