"""Generation inside the training process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_sampling import chi_square
from tiny import CONFIGS, END, Source, random_tokens, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sppo_lightning.generation import HFGenerator, PolicySource, SampleRequest, hf
from sppo_lightning.types import Response

LONGEST = 12
PROMPTS = random_tokens(3, 1, 40, 17)  # over and under the sliding windows of 6
NEVER = frozenset({END})


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
    answers = answer(engine(source, **settings), requests)
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


# --------------------------------------------------------------------- greedy


def transformers_greedy(model: PreTrainedModel, prompt: tuple[int, ...], ends: frozenset[int]) -> list[int]:
    """One prompt at a time, so that nothing is padded."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=LONGEST,
        eos_token_id=sorted(ends),
        pad_token_id=2,
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_equals_transformers(kind: str) -> None:
    """Two ids end a response: those that end the first two early; the others are cut."""
    model = tiny_model(kind)
    free = [one.token_ids for one in greedy(Source(model, NEVER), PROMPTS)]
    assert END not in {token for row in free for token in row}
    ends = frozenset({free[0][2], free[1][5]})
    found = greedy(Source(model, ends), PROMPTS)
    assert [list(one.token_ids) for one in found] == [
        transformers_greedy(model, prompt, ends) for prompt in PROMPTS
    ]
    assert {one.finish_reason for one in found} == {"stop", "length"}
    for one in found:
        assert (one.finish_reason == "stop") == (one.token_ids[-1] in ends)
        assert not ends & set(one.token_ids[:-1])
        assert (one.finish_reason == "stop") or len(one.token_ids) == LONGEST


def test_any_of_several_end_tokens_ends_a_response_and_stays_in_it() -> None:
    model = tiny_model()
    free = [one.token_ids for one in greedy(Source(model, NEVER), PROMPTS)]
    firsts = [next(token for token in row[2:] if token not in row[:2]) for row in free]
    found = greedy(Source(model, frozenset(firsts)), PROMPTS)
    for one, row in zip(found, free, strict=True):
        end = next(index for index, token in enumerate(row) if token in firsts)
        assert one.token_ids == row[: end + 1]
        assert one.finish_reason == "stop"


def test_a_cut_response_gets_no_end_token_and_one_that_ends_on_its_last_token_is_no_cut() -> None:
    model = tiny_model()
    free = greedy(Source(model, NEVER), PROMPTS[:1])[0].token_ids
    place = next(index for index in range(3, LONGEST) if free[index] not in free[:index])
    source = Source(model, frozenset({free[place]}))
    (cut,) = greedy(source, PROMPTS[:1], max_new_tokens=place)
    (whole,) = greedy(source, PROMPTS[:1], max_new_tokens=place + 1)
    assert (cut.token_ids, cut.finish_reason) == (free[:place], "length")
    assert (whole.token_ids, whole.finish_reason) == (free[: place + 1], "stop")


def test_text_is_the_response_without_its_end_token_and_other_special_tokens() -> None:
    source = Source(tiny_model())
    free = greedy(Source(tiny_model(), NEVER), PROMPTS[:1])[0]
    assert free.text == source.tokenizer.decode(free.token_ids, skip_special_tokens=True)
    source.end_token_ids = frozenset({free.token_ids[0]})
    (stopped,) = greedy(source, PROMPTS[:1])
    assert (stopped.token_ids, stopped.text) == (free.token_ids[:1], "")


def test_greedy_ignores_the_temperature() -> None:
    cold, hot = (greedy(Source(tiny_model(), NEVER), PROMPTS, temperature=value) for value in (0.01, 100.0))
    assert cold == hot


# -------------------------------------------------------------------- sampled

REQUESTS = [
    SampleRequest(prompt, tuple(range(100 * number, 100 * number + 3)))
    for number, prompt in enumerate(random_tokens(2, 30, 7, 7, 1, 19, 4, 11, seed=1))
]
EARLY = frozenset(range(END, 259, 6))  # one token in six ends a response


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3"])
def source(request: pytest.FixtureRequest) -> Source:
    return Source(tiny_model(request.param), EARLY)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_responses_do_not_depend_on_the_batch(source: Source, batch_size: int) -> None:
    expected = sampled(source, REQUESTS, batch_size=24)
    lengths = {len(tokens) for tokens in expected.values()}
    assert len(expected) == 24
    assert len(set(expected.values())) > 20
    assert len(lengths) > 4  # rows leave the batch one by one
    assert sampled(source, REQUESTS, batch_size=batch_size) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_responses_do_not_depend_on_the_order(seed: int) -> None:
    source = Source(tiny_model(), EARLY)
    shuffled = [
        SampleRequest(request.token_ids, tuple(random.Random(seed).sample(request.seeds, 3)))
        for request in random.Random(seed).sample(REQUESTS, len(REQUESTS))
    ]
    assert sampled(source, shuffled, batch_size=7) == sampled(source, REQUESTS, batch_size=7)


def test_responses_do_not_depend_on_how_many_are_asked_for() -> None:
    source = Source(tiny_model(), EARLY)
    together = sampled(source, REQUESTS)
    for part in (slice(0, 1), slice(1, 3)):
        alone = [request._replace(seeds=request.seeds[part]) for request in REQUESTS]
        assert sampled(source, alone).items() <= together.items()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_that_leave_the_batch_change_nothing(
    source: Source, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 0 no row leaves before all are done; at 1 each leaves at once."""
    selections: list[int] = []
    select = DynamicCache.batch_select_indices

    def counted(cache: DynamicCache, indices: Tensor) -> None:
        selections.append(len(indices))
        select(cache, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", counted)
    expected = sampled(source, REQUESTS)
    assert len(selections) >= 2  # the first repeats each prompt for its responses
    assert selections == sorted(selections, reverse=True)
    selections.clear()
    monkeypatch.setattr(hf, "COMPACT_BELOW", share)
    assert sampled(source, REQUESTS) == expected
    assert len(selections) == 1 if share == 0 else len(selections) > 4


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    source = Source(tiny_model(), EARLY)
    mixed = [request if number % 2 else request._replace(seeds=()) for number, request in enumerate(REQUESTS)]
    answers = answer(engine(source), mixed)
    plain = greedy(source, [request.token_ids for request in REQUESTS])
    drawn = answer(engine(source), REQUESTS)
    for number in range(len(mixed)):
        assert answers[number] == (drawn[number] if number % 2 else [plain[number]])


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 5, "temperature": 2.0}, {"top_p": 0.8}]
)
def test_first_tokens_follow_the_models_distribution(settings: dict[str, Any]) -> None:
    """Against a plain forward pass, warped by hand; rare tokens are counted together."""
    model = tiny_model()
    prompt = PROMPTS[0]
    requests = [SampleRequest(prompt, tuple(range(4000)))]
    found = sampled(Source(model), requests, max_new_tokens=1, batch_size=4000, **settings)
    probs = (model(torch.tensor([prompt])).logits[0, -1].double() / settings.get("temperature", 1.0)).softmax(
        -1
    )
    ranked = probs.sort(descending=True)
    keep = settings.get("top_k", len(probs))
    if "top_p" in settings:
        keep = int((ranked.values.cumsum(-1) < settings["top_p"]).sum()) + 1
    probs[ranked.indices[keep:]] = 0
    drawn = torch.tensor([tokens[0] for tokens in found.values()])
    assert chi_square(drawn, probs / probs.sum()) < 1


# ------------------------------------------------------------- cost and bounds


def test_no_more_than_batch_size_responses_grow_at_once() -> None:
    source = Source(tiny_model(), NEVER)
    requests = [SampleRequest(prompt, tuple(range(7))) for prompt in PROMPTS[:2]]
    with forwards(source.model) as shapes:
        sampled(source, requests, batch_size=3)
    assert max(rows for rows, _ in shapes) == 3


def test_a_prompt_is_read_once_for_its_responses_and_every_later_pass_reads_one_token() -> None:
    source = Source(tiny_model(), NEVER)
    with forwards(source.model) as shapes:
        sampled(source, REQUESTS[:3], max_new_tokens=4)
    assert shapes == [(3, 30), (9, 1), (9, 1), (9, 1)]


def test_generation_stops_when_every_response_has_ended() -> None:
    free = greedy(Source(tiny_model(), NEVER), PROMPTS)
    source = Source(tiny_model(), frozenset(one.token_ids[1] for one in free))
    with forwards(source.model) as shapes:
        found = greedy(source, PROMPTS)
    assert len(shapes) == max(len(one.token_ids) for one in found) < LONGEST


def test_prompts_of_similar_length_share_a_batch() -> None:
    requests = [SampleRequest(prompt, (0,)) for prompt in random_tokens(30, 2, 29, 3)]
    source = Source(tiny_model(), NEVER)
    with forwards(source.model) as shapes:
        list(engine(source, batch_size=2, max_new_tokens=1).generate(requests))
    assert shapes == [(2, 3), (2, 30)]


def test_nothing_asked_nothing_answered() -> None:
    assert list(engine(Source(tiny_model())).generate([])) == []


def test_load_takes_the_policy_as_it_is_now() -> None:
    source = Source(tiny_model("llama"), NEVER)
    generator = engine(source)
    first = answer(generator, [SampleRequest(PROMPTS[0], ())])
    generator.unload()
    source.model = tiny_model("qwen2")
    generator.load(source)
    assert answer(generator, [SampleRequest(PROMPTS[0], ())]) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"HFGenerator\.max_new_tokens=0 must be at least 1"),
        ({"temperature": 0.0}, r"HFGenerator\.temperature=0\.0 must be greater than 0: identical samples"),
        ({"temperature": float("nan")}, r"HFGenerator\.temperature=nan must be greater than 0"),
        ({"top_p": 0.0}, r"HFGenerator\.top_p=0\.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"HFGenerator\.top_p=1\.5 must lie in \(0, 1\]"),
        ({"top_k": -1}, r"HFGenerator\.top_k=-1 must be 0 \(all tokens\) or more"),
        ({"batch_size": 0}, r"HFGenerator\.batch_size=0 must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HFGenerator(**{"max_new_tokens": 4, "temperature": 1.0, **settings})
