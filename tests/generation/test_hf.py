"""Generation inside the training process."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.distributions import chi_square
from support.models import byte_tokenizer
from support.sampling import (
    EARLY,
    GROUPS,
    LONGEST,
    NEVER,
    PROMPTS,
    REQUESTS,
    STATEFUL,
    answer,
    by_seed,
    engine,
    forwards,
    greedy,
    sampled,
)
from support.tiny import CONFIGS, END, Source, random_tokens, tiny_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sppo_lightning.generation import HFGenerator, SampleRequest, batched_decoding, hf
from sppo_lightning.generation.batched_decoding import Batching
from sppo_lightning.generation.cache_size import RowBytes
from sppo_lightning.generation.steps import PlainSteps
from sppo_lightning.types import Response, UserError

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


@pytest.mark.parametrize("kind", [*CONFIGS, *STATEFUL])
def test_greedy_equals_transformers(kind: str) -> None:
    """Two ids end a response: those that end the first two early; the others are cut."""
    model = tiny_model(kind)
    free = [one.token_ids for one in greedy(Source(model, NEVER), PROMPTS)]
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


def test_a_batch_says_how_far_it_is() -> None:
    """Two prompts of three and one responses; all that is sampled is told once, and at the end all is done."""
    told: list[tuple[float, int]] = []
    engine = HFGenerator(max_new_tokens=LONGEST, temperature=1.0)
    engine.load(Source(tiny_model(), NEVER))
    engine.on_batch_progress = lambda prompts, tokens: told.append((prompts, tokens))
    requests = [SampleRequest(PROMPTS[0], (1, 2, 3)), SampleRequest(PROMPTS[0], (4,))]
    list(engine.generate(requests))
    assert [tokens for _, tokens in told] == [4 * (step + 1) for step in range(LONGEST)]
    assert all(0 < prompts <= 2 for prompts, _ in told)
    assert told[-1][0] == 2


@pytest.mark.parametrize(
    ("step", "left", "read", "spent", "share"),
    [
        (0, 1.0, 6.0, 6.0, 0.1),  # the first of ten tokens: nothing says how long one takes
        (1, 1.0, 6.0, 7.0, 7 / 16),  # a second a token: ten after the six of the prompts
        (5, 1.0, 6.0, 11.0, 11 / 16),
        (5, 0.25, 6.0, 11.0, 11 / (6 + 5 / 0.75)),  # three quarters of the responses have ended
        (5, 0.0, 6.0, 11.0, 1.0),
    ],
)
def test_the_time_of_a_batch_is_that_of_its_prompts_and_of_its_tokens(
    step: int, left: float, read: float, spent: float, share: float
) -> None:
    engine = HFGenerator(max_new_tokens=10, temperature=1.0)
    assert engine._share(step, left, read, spent) == pytest.approx(share)


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


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3", "qwen3_5"])
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
    select = DynamicCache.reorder_cache

    def counted(cache: DynamicCache, indices: Any) -> None:
        selections.append(len(indices))
        select(cache, indices)

    def sampled_again() -> list[list[Response]]:
        generator = engine(source)
        selections.clear()
        return answer(generator, REQUESTS)

    monkeypatch.setattr(DynamicCache, "reorder_cache", counted)
    expected = sampled_again()
    assert len(selections) >= 2  # the first repeats each prompt for its responses
    assert selections == sorted(selections, reverse=True)
    monkeypatch.setattr(PlainSteps, "COMPACT_BELOW", share)
    assert sampled_again() == expected
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
    generator = engine(Source(tiny_model(), NEVER), batch_size=3)
    requests = [SampleRequest(prompt, tuple(range(7))) for prompt in PROMPTS[:2]]
    with forwards(tiny_model()) as shapes:
        answer(generator, requests)
    assert max(rows for rows, _ in shapes) == 3


def test_a_prompt_is_read_once_for_its_responses_and_every_later_pass_reads_one_token() -> None:
    generator = engine(Source(tiny_model(), NEVER), max_new_tokens=4)
    with forwards(tiny_model()) as shapes:
        answer(generator, REQUESTS[:3])
    assert shapes == [(3, 30), (9, 1), (9, 1), (9, 1)]


def test_generation_stops_when_every_response_has_ended() -> None:
    free = greedy(Source(tiny_model(), NEVER), PROMPTS)
    generator = engine(Source(tiny_model(), frozenset(one.token_ids[1] for one in free)))
    with forwards(tiny_model()) as shapes:
        found = [one for (one,) in answer(generator, [SampleRequest(prompt, ()) for prompt in PROMPTS])]
    assert len(shapes) == max(len(one.token_ids) for one in found) < LONGEST


def test_prompts_of_similar_length_share_a_batch() -> None:
    requests = [SampleRequest(prompt, (0,)) for prompt in random_tokens(30, 2, 29, 3)]
    generator = engine(Source(tiny_model(), NEVER), batch_size=2, max_new_tokens=1)
    with forwards(tiny_model()) as shapes:
        list(generator.generate(requests))
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
        ({"stop": []}, r"HFGenerator\.stop=\[\] must hold texts that are not empty"),
        ({"stop": ["a", ""]}, r"HFGenerator\.stop=\['a', ''\] must hold texts that are not empty"),
        ({"max_total_tokens": 1}, r"HFGenerator\.max_total_tokens=1 must be at least 2"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HFGenerator(**{"max_new_tokens": 4, "temperature": 1.0, **settings})


# ------------------------------------------------------------------ automatic batches


def hold(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory hold the keys and values of so many tokens, whichever the model."""
    monkeypatch.setattr(batched_decoding, "check_batching", lambda model: Batching(True, RowBytes(1, 0)))
    monkeypatch.setattr(hf, "free_bytes", lambda device: tokens / hf.MEMORY_SHARE + 0.01)


@contextmanager
def memory(model: nn.Module, most: int, calls: int = 2000) -> Iterator[list[tuple[int, int]]]:
    """Record rows and tokens held of every forward pass; more than ``most`` of them find the memory full."""
    held: list[tuple[int, int]] = []

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, width = kwargs["attention_mask"].shape
        held.append((rows, width))
        assert len(held) < calls, "goes on for ever"
        if rows * width > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield held
    finally:
        handle.remove()


@pytest.mark.parametrize("tokens", [1, 90, 100_000])
def test_responses_do_not_depend_on_the_memory(
    source: Source, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(source, REQUESTS, batch_size=7)
    hold(tokens, monkeypatch)
    assert sampled(source, REQUESTS) == expected


@pytest.mark.parametrize("tokens", [1, 30, 77, 150, 400])
def test_no_batch_is_over_the_budget(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows times prompt and longest response, padding included, until the last token."""
    source = Source(tiny_model(), NEVER)
    hold(tokens, monkeypatch)
    with memory(source.model, most=100_000) as held:
        sampled(source, GROUPS)
    assert all(rows == 1 or rows * (width + 1) <= tokens for rows, width in held)
    assert max(rows for rows, _ in held) == {1: 1, 30: 2, 77: 5, 150: 5, 400: 15}[tokens]


def test_a_prompts_responses_stay_together_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five responses to the longest prompt, of 37 tokens each, are 185: it alone is read in parts at 184."""
    source = Source(tiny_model(), NEVER)
    for tokens, read in ((185, 6), (184, 7)):
        hold(tokens, monkeypatch)
        with forwards(source.model) as shapes:
            sampled(source, GROUPS, max_new_tokens=LONGEST)
        assert sum(rows for rows, width in shapes if width > 1) == read


@pytest.mark.parametrize("tokens", [1, 3 * (40 + LONGEST), 7 * (40 + LONGEST)])
def test_a_prompts_responses_that_grow_apart_come_back_together(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(tiny_model(), EARLY)
    request = SampleRequest(PROMPTS[2], tuple(range(7)))
    (expected,) = answer(engine(source, batch_size=7), [request])
    hold(tokens, monkeypatch)
    (found,) = engine(source).generate([request])
    assert found.responses == expected


def test_a_cpu_gains_nothing_from_more_rows() -> None:
    generator = engine(Source(tiny_model(), NEVER), max_new_tokens=2)
    with forwards(tiny_model()) as shapes:
        answer(generator, [SampleRequest(PROMPTS[0], tuple(range(200)))])
    assert max(rows for rows, _ in shapes) == 128


# ---------------------------------------------------------------------- full memory

FULL = r"^\d+ responses of up to \d+ tokens did not fit into memory at once: halving the batch$"


@pytest.mark.parametrize(
    ("batch_size", "most", "read"),
    [(None, 45, 0), (None, 149, 0), (None, 150, 1), (None, 800, 2), (20, 45, 1)],
)
def test_a_full_memory_halves_the_batch_and_is_remembered(
    batch_size: int | None, most: int, read: int
) -> None:
    """Six prompts of up to 25 tokens are 150 when they are read, and 30 responses are 780 one token later; the
    first four prompts of 9 are 36, and their 20 responses 200. ``read``: passes that fit at first."""
    source = Source(tiny_model(), EARLY)
    expected = sampled(source, GROUPS)
    generator = engine(source, batch_size=batch_size)
    with memory(source.model, most) as held:
        with pytest.warns(UserWarning, match=FULL):
            found = answer(generator, GROUPS)
        assert [rows * width > most for rows, width in held].index(True) == read
        assert by_seed(GROUPS, found) == expected
        generator.unload()
        generator.load(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answer(generator, GROUPS) == found


def test_what_did_not_fit_stays_in_the_order_of_its_lengths() -> None:
    """30 responses of up to 37 tokens are 1,110; of the 555 that are left, prompts of 3 to 9 tokens take 420."""
    source = Source(tiny_model(), NEVER)
    generator = engine(source)
    with forwards(source.model) as shapes, memory(source.model, 800), pytest.warns(UserWarning, match=FULL):
        answer(generator, GROUPS)
    assert [shape for shape in shapes if shape[1] > 1] == [(6, 25), (4, 9), (2, 25)]


def test_a_full_memory_is_told_with_numbers() -> None:
    """Prompts of 40 tokens with four responses of 12: 8 and 4 of them pass 110 tokens, 2 do not."""
    source = Source(tiny_model(), NEVER)
    requests = [SampleRequest(prompt, (0, 1, 2, 3)) for prompt in random_tokens(40, 40)]
    generator = engine(source)
    with memory(source.model, 110) as held, pytest.warns(UserWarning, match=FULL) as told:
        answer(generator, requests)
    assert [str(one.message) for one in told] == [
        f"{rows} responses of up to 52 tokens did not fit into memory at once: halving the batch"
        for rows in (8, 4)
    ]
    assert [rows for rows, width in held if width == 51] == [2, 2, 2, 2]


def test_greedy_answers_are_halved_too() -> None:
    source = Source(tiny_model(), NEVER)
    expected = greedy(source, PROMPTS)
    generator = engine(source)
    with memory(source.model, 60), pytest.warns(UserWarning, match=FULL):
        found = answer(generator, [SampleRequest(prompt, ()) for prompt in PROMPTS])
    assert [one for (one,) in found] == expected


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("most", [39, 45])
@pytest.mark.filterwarnings("ignore:.*did not fit into memory")
def test_a_single_response_that_does_not_fit(seeds: tuple[int, ...], most: int) -> None:
    """The prompt of 40 tokens alone, or the prompt and what has grown behind it."""
    source = Source(tiny_model(), NEVER)
    message = (
        r"^one response of up to 52 tokens, prompt included, does not fit into the memory of cpu: lower "
        r"max_new_tokens or data\.max_prompt_tokens, or use a smaller policy$"
    )
    generator = engine(source)
    with memory(source.model, most, calls=100), pytest.raises(UserError, match=message):
        answer(generator, [SampleRequest(PROMPTS[2], seeds)])


def test_another_error_of_the_model_passes() -> None:
    source = Source(tiny_model(), NEVER)

    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    generator = engine(source)
    handle = source.model.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
            answer(generator, REQUESTS)
    finally:
        handle.remove()


# ---------------------------------------------------------------------- stop strings


def letters(text: str) -> tuple[int, ...]:
    """One token a letter."""
    return tuple(byte_tokenizer()(text)["input_ids"])


LETTERS = letters("abcde")


def flat(answers: list[list[Response]]) -> list[Response]:
    return [one for responses in answers for one in responses]


@contextmanager
def spelling(model: nn.Module, allowed: Sequence[int] = LETTERS) -> Iterator[None]:
    """Let a model say nothing but ``allowed`` tokens."""
    silent = torch.ones(259, dtype=torch.bool)
    silent[list(allowed)] = False

    def mute(module: nn.Module, args: Any, output: Any) -> None:
        output.logits[..., silent] = -torch.inf

    handle = model.register_forward_hook(mute)
    try:
        yield
    finally:
        handle.remove()


def cut(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """By hand: what is sampled up to the first stop string that is complete, and what of it is shown."""
    for length in range(1, len(text) + 1):
        if any(text[:length].endswith(stop) for stop in stops):
            places = [place for stop in stops if (place := text[:length].find(stop)) >= 0]
            return text[:length], text[: min(places)]
    return text, text


STOPS = [["a"], ["ab"], ["cd", "b"], ["abc", "bc"], ["dea", "ed", "aa"], ["zzz"], ["bb", "bbb"]]


@pytest.mark.parametrize("stop", STOPS, ids="|".join)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_stop_string_ends_a_response(kind: str, stop: list[str]) -> None:
    """Against the same draws without one: those that end early leave the others as they are."""
    source = Source(tiny_model(kind), NEVER)
    with spelling(source.model):
        free = answer(engine(source, max_new_tokens=20), REQUESTS)
        found = answer(engine(source, max_new_tokens=20, stop=stop), REQUESTS)
    for plain, stopped in zip(flat(free), flat(found), strict=True):
        kept, shown = cut(plain.text, stop)
        assert stopped.token_ids == letters(kept) == plain.token_ids[: len(kept)]
        assert stopped.text == shown
        assert stopped.finish_reason == ("length" if shown == plain.text else "stop")
    assert ("stop" in {one.finish_reason for one in flat(found)}) == (stop != ["zzz"])


@pytest.mark.parametrize("stop", [["a"], ["ab", "ea"], ["dde"]], ids="|".join)
def test_a_stop_string_ends_a_greedy_answer(stop: list[str]) -> None:
    source = Source(tiny_model(), NEVER)
    prompts = [request.token_ids for request in REQUESTS]
    with spelling(source.model):
        free = greedy(source, prompts, max_new_tokens=20)
        found = greedy(source, prompts, max_new_tokens=20, stop=stop)
    for plain, stopped in zip(free, found, strict=True):
        kept, shown = cut(plain.text, stop)
        assert (stopped.token_ids, stopped.text) == (letters(kept), shown)
    assert found != free


def test_stop_strings_do_not_depend_on_the_batch() -> None:
    source = Source(tiny_model(), EARLY)
    settings: dict[str, Any] = {"max_new_tokens": 20, "stop": ["ab", "cc", "e"]}
    with spelling(source.model, [*LETTERS, END]):
        expected = sampled(source, REQUESTS, batch_size=24, **settings)
        for batch_size in (1, 5):
            assert sampled(source, REQUESTS, batch_size=batch_size, **settings) == expected


def test_an_end_token_and_a_stop_string_work_side_by_side() -> None:
    source = Source(tiny_model(), frozenset({END}))
    with spelling(source.model, [*LETTERS, END]):
        found = flat(answer(engine(source, max_new_tokens=20, stop=["ab"]), REQUESTS))
    ended = [one for one in found if one.token_ids[-1] == END]
    stopped = [one for one in found if one.token_ids[-2:] == letters("ab")]
    assert min(len(ended), len(stopped)) > 2
    assert {one.finish_reason for one in ended + stopped} == {"stop"}
    assert all(one.token_ids == (*letters(one.text), END) for one in ended)
    assert all(one.token_ids == letters(one.text + "ab") for one in stopped)


def test_a_stop_string_in_the_prompt_ends_nothing() -> None:
    """Nor does one whose beginning the prompt holds."""
    source = Source(tiny_model(), NEVER)
    with spelling(source.model):
        (free,) = greedy(source, [letters("say ab")])
        (found,) = greedy(source, [letters("say ab")], stop=["ab" + free.text[0], "zzz"])
    assert found == free


def test_a_stop_string_of_several_bytes_a_character() -> None:
    """Two tokens a character; a half of it ends nothing."""
    source = Source(tiny_model(), NEVER)
    accents = letters("éà")
    with spelling(source.model, sorted(set(accents))):
        free = flat(answer(engine(source, max_new_tokens=20), REQUESTS))
        found = flat(answer(engine(source, max_new_tokens=20, stop=["é"]), REQUESTS))
    stopped = [one for one in found if one.finish_reason == "stop"]
    assert stopped
    for plain, one in zip(free, found, strict=True):
        assert plain.token_ids[: len(one.token_ids)] == one.token_ids
        assert (one.finish_reason == "stop") == (one.token_ids[-2:] == letters("é"))
        assert "é" not in one.text


def test_a_special_token_as_a_stop_string_ends_a_response_as_any_other() -> None:
    """It is no part of the text anyway."""
    source = Source(tiny_model(), NEVER)
    with spelling(source.model, [*LETTERS, 2]):
        found = flat(answer(engine(source, max_new_tokens=20, stop=["<pad>"]), REQUESTS))
    stopped = [one for one in found if 2 in one.token_ids]
    assert len(stopped) > 2
    assert all(one.token_ids == (*letters(one.text), 2) for one in stopped)
    assert {one.finish_reason for one in stopped} == {"stop"}


# ---------------------------------------------------------------------- total length


def test_prompt_and_response_together_are_limited_row_by_row() -> None:
    """Prompts of 2, 30, 7, 7, 1, 19, 4 and 11 tokens in one batch; the longest has room for one token."""
    source = Source(tiny_model(), NEVER)
    free = answer(engine(source, max_new_tokens=20), REQUESTS)
    generator = engine(source, max_new_tokens=20, max_total_tokens=31)
    with forwards(source.model) as shapes:
        found = answer(generator, REQUESTS)
    assert shapes[0] == (8, 30)
    for request, plain, limited in zip(REQUESTS, free, found, strict=True):
        room = min(20, 31 - len(request.token_ids))
        assert [one.token_ids for one in limited] == [one.token_ids[:room] for one in plain]
        for one in limited:
            assert one.finish_reason == ("stop" if one.token_ids[-1] == END else "length")
    assert {len(one.token_ids) for one in found[1]} == {1}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_limit_of_the_total_does_not_depend_on_the_batch(source: Source, batch_size: int) -> None:
    limits = {"max_new_tokens": 20, "max_total_tokens": 33}
    expected = sampled(source, REQUESTS, batch_size=24, **limits)
    assert sampled(source, REQUESTS, batch_size=batch_size, **limits) == expected


def test_a_response_that_ends_on_its_last_token_of_the_total_is_no_cut() -> None:
    free = greedy(Source(tiny_model(), NEVER), PROMPTS[:1])[0].token_ids
    place = next(index for index in range(3, LONGEST) if free[index] not in free[:index])
    source = Source(tiny_model(), frozenset({free[place]}))
    prompt = len(PROMPTS[0])
    (whole,) = greedy(source, PROMPTS[:1], max_total_tokens=prompt + place + 1)
    (cut,) = greedy(source, PROMPTS[:1], max_total_tokens=prompt + place)
    assert (whole.token_ids, whole.finish_reason) == (free[: place + 1], "stop")
    assert (cut.token_ids, cut.finish_reason) == (free[:place], "length")


@pytest.mark.parametrize(
    ("total", "prompt", "expected"), [(None, 500, 12), (31, 30, 1), (31, 19, 12), (31, 20, 11)]
)
def test_the_longest_response_by_hand(total: int | None, prompt: int, expected: int) -> None:
    generator = HFGenerator(max_new_tokens=12, temperature=1.0, max_total_tokens=total)
    assert generator.longest_response(prompt) == expected
