"""Sampling from servers: a real ``transformers serve``, and recorded contracts of vLLM and SGLang.

The real server takes some 10 seconds to start and serves the whole file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from support.models import byte_tokenizer, tiny_config
from support.servers import Answer, LocalServer, Request, serving, unused_port
from support.tiny import Source
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sppo_lightning.generation import Generator, HFGenerator, SampleRequest
from sppo_lightning.generation.completions import prompt_text
from sppo_lightning.generation.server import SEEDS, OpenAIServerGenerator
from sppo_lightning.generation.weight_sync import (
    ModelFolder,
    OffPolicy,
    SGLangWeights,
    VLLMAdapter,
    WeightSync,
    exported,
)
from sppo_lightning.types import Response, UserError

BOS, END, PAD = 0, 1, 2
LONGEST = 12
TOKENIZER = byte_tokenizer()
NO_TEXT = next((token,) for token in range(3, 259) if TOKENIZER.decode([token]) == "\ufffd")


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@dataclass
class Policy(Source):
    """What a run's policy offers to an engine."""

    model: LlamaForCausalLM
    exports: int = 0

    def export(self, folder: Path) -> None:
        self.exports += 1
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def letters_policy(seed: int = 0, *, letters: str = "abcdefghijklmnopqrstuvwxyz") -> Policy:
    """A random model that says ASCII letters, which any tokenizer finds again, and ends now and then."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config())
    said = torch.tensor([END, *ids_of(letters)])
    with torch.no_grad():
        rows = torch.randn(len(said), 32)
        model.lm_head.weight.zero_()
        model.lm_head.weight[said] = rows * 1.5
    return Policy(model)


def bytes_policy() -> Policy:
    """A random model that says any bytes: most of it is no text."""
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(tiny_config()))


def answer(generator: Generator, requests: Sequence[SampleRequest]) -> list[list[Response]]:
    """Answer requests; the result is in request order."""
    found = list(generator.generate(requests))
    assert sorted(one.request for one in found) == list(range(len(requests)))
    return [one.responses for one in sorted(found, key=lambda one: one.request)]


def in_process(policy: Policy, requests: Sequence[SampleRequest], **settings: Any) -> list[list[Response]]:
    """The same requests answered by the policy itself."""
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, "batch_size": 8, **settings})
    generator.load(policy)
    return answer(generator, requests)


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ------------------------------------------------------------ transformers serve


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server."""
    url = f"http://127.0.0.1:{unused_port()}"
    place = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    settings = ["--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", "serve", *place, *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until_healthy(url, process, log)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            direct.open(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text())


def served(url: str, folder: Path, **settings: Any) -> OpenAIServerGenerator:
    """A generator on ``transformers serve``."""
    defaults: dict[str, Any] = {
        "weight_sync": ModelFolder(str(folder)),
        "prompt_format": "text",
        "max_new_tokens": LONGEST,
        "temperature": 1.0,
        "max_concurrency": 4,
        "max_retries": 1,  # of a connection that the server closes as it is used again
        "startup_timeout": 0,
    }
    return OpenAIServerGenerator(url, **{**defaults, **settings})


GREEDY = [SampleRequest((BOS, *ids_of(text)), ()) for text in ("Say river", "x", "Name a stone, please", "?")]


def test_greedy_answers_equal_those_of_the_policy_itself(transformers_serve: str, tmp_path: Path) -> None:
    policy = letters_policy()
    generator = served(transformers_serve, tmp_path)
    generator.load(policy)
    found = answer(generator, GREEDY)
    assert found == in_process(policy, GREEDY)
    assert {one.finish_reason for (one,) in found} == {"stop", "length"}  # both kinds of ending were compared


def test_a_changed_policy_changes_the_answers(transformers_serve: str, tmp_path: Path) -> None:
    policy = letters_policy()
    generator = served(transformers_serve, tmp_path)
    generator.load(policy)
    before = answer(generator, GREEDY)
    generator.unload()
    (old,) = tmp_path.iterdir()
    with torch.no_grad():
        policy.model.lm_head.weight.neg_()
    generator.load(policy)
    after = answer(generator, GREEDY)
    assert after != before
    assert after == in_process(policy, GREEDY)
    (new,) = tmp_path.iterdir()
    assert new != old


def test_samples_are_the_tokens_of_their_texts_and_differ_by_seed(
    transformers_serve: str, tmp_path: Path
) -> None:
    policy = letters_policy()
    # one request at a time: the server seeds torch's one generator for each, also while another is being answered
    generator = served(transformers_serve, tmp_path, max_concurrency=1)
    generator.load(policy)
    ((*responses,),) = answer(generator, [SampleRequest(ids_of("Say river"), tuple(range(12)))])
    usable = [one for one in responses if one.drop_reason is None]
    assert len(usable) >= 6
    assert len({one.token_ids for one in usable}) >= 4
    for one in usable:
        said = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == END)
        assert (one.finish_reason == "stop") or len(one.token_ids) == LONGEST
        assert policy.tokenizer.decode(said) == one.text
        assert END not in said
    for one in set(responses) - set(usable):
        assert (one.token_ids, one.finish_reason, one.drop_reason) == (
            (),
            "failed",
            "retokenised_differently",
        )


def test_what_the_tokenizer_would_cut_differently_is_dropped(transformers_serve: str, tmp_path: Path) -> None:
    policy = bytes_policy()
    generator = served(transformers_serve, tmp_path)
    generator.load(policy)
    dropped = 0
    for (found,), (sampled,) in zip(answer(generator, GREEDY), in_process(policy, GREEDY), strict=True):
        if found.drop_reason is None:
            assert found == sampled
            continue
        dropped += 1
        assert found.drop_reason == "retokenised_differently"
        assert ids_of(found.text) != sampled.token_ids
    assert dropped > 0


def test_lengths_and_stop_strings(transformers_serve: str, tmp_path: Path) -> None:
    """The tokens end where the policy itself ends them, the one that completes the stop string included."""
    policy = letters_policy()
    free = answer_greedily(policy)
    text = max((one.text for (one,) in free), key=len)
    stop = [text[3:5]]
    settings: dict[str, Any] = {"max_new_tokens": 8, "max_total_tokens": 15, "stop": stop}
    generator = served(transformers_serve, tmp_path, **settings)
    generator.load(policy)
    found = answer(generator, GREEDY)
    longest = [min(8, 15 - len(request.token_ids)) for request in GREEDY]
    assert longest == [5, 8, -6, 8]
    assert found[2] == [Response((), "", "failed", drop_reason="prompt_too_long")]
    for position in (0, 1, 3):
        (one,) = found[position]
        (whole,) = free[position]
        cut = whole.text.find(stop[0])
        length = min([len(whole.token_ids), longest[position], *([cut + 2] if cut >= 0 else [])])
        if one.drop_reason is None:
            assert one.token_ids == whole.token_ids[:length]
            assert stop[0] not in one.text
    stopped = [one for (one,), (whole,) in zip(found, free, strict=True) if whole.text == text]
    assert stopped[0].text == text[:3]
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].token_ids == ids_of(text[:5])


def answer_greedily(policy: Policy) -> list[list[Response]]:
    return in_process(policy, GREEDY)


def test_an_unknown_model_stops_the_run(transformers_serve: str, tmp_path: Path) -> None:
    generator = served(transformers_serve, tmp_path, weight_sync=OffPolicy(), model=str(tmp_path / "none"))
    with pytest.warns(UserWarning, match=r"OffPolicy: responses come from .*none' as .* iteration 1"):
        generator.load(letters_policy())
    with (
        pytest.warns(UserWarning, match="a response is dropped as server_error"),
        pytest.raises(UserError, match=r"not one request was answered: .* \(look at the server's log"),
    ):
        answer(generator, GREEDY[:1])


def test_a_field_that_the_server_does_not_know_stops_the_run(transformers_serve: str, tmp_path: Path) -> None:
    generator = served(transformers_serve, tmp_path, top_k=5)
    generator.load(letters_policy())
    with (
        pytest.warns(UserWarning, match="Unexpected fields"),
        pytest.raises(UserError, match=r"not one request was answered: .*422 Unexpected fields .*'top_k'"),
    ):
        answer(generator, [SampleRequest(ids_of("x"), (1, 2))])


def test_a_prompt_in_token_ids_is_refused_with_the_way_out(transformers_serve: str, tmp_path: Path) -> None:
    generator = served(transformers_serve, tmp_path, prompt_format="token_ids")
    with pytest.raises(UserError, match=r"422 Unexpected fields.* needs prompt_format: text\)"):
        generator.load(letters_policy())


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    generator = served(f"http://127.0.0.1:{unused_port()}/v1", tmp_path)
    with pytest.raises(UserError, match=r"data.generator.base_url=.* cannot be reached .*start the server"):
        generator.load(letters_policy())


# -------------------------------------------------------------- recorded contracts


class Completions:
    """A server that continues every prompt with the next of some recorded choices."""

    def __init__(self, *choices: dict[str, Any], **usage: Any) -> None:
        self.choices = list(choices)
        self.usage = usage
        self.taken = 0

    def __call__(self, request: Request) -> Answer:
        choice = self.choices[min(self.taken, len(self.choices) - 1)]
        self.taken += 1
        usage = {"prompt_tokens": len(request.body["prompt"]), "completion_tokens": 0, **self.usage}
        return Answer(200, {"object": "text_completion", "choices": [{"index": 0, **choice}], "usage": usage})


VLLM = {"logprobs": None, "prompt_logprobs": None, "stop_reason": None}


def asked(
    respond: Callable[[Request], Answer], requests: Sequence[SampleRequest], **settings: Any
) -> tuple[list[list[Response]], LocalServer]:
    """Answer requests by a server that replays answers; one request at a time, to know which is which."""
    policy = settings.pop("policy", None) or letters_policy()
    with serving(lambda request: Answer(200, LISTED) if is_listing(request) else respond(request)) as local:
        generator = contract(local.url, **settings)
        generator.load(policy)
        local.requests.clear()
        try:
            return answer(generator, requests), local
        finally:
            generator.unload()


LISTED = {"data": [{"id": "served"}]}


def is_listing(request: Request) -> bool:
    return request.path == "/v1/models"


def contract(url: str, **settings: Any) -> OpenAIServerGenerator:
    defaults: dict[str, Any] = {
        "weight_sync": Nothing(),
        "model": "served",
        "max_new_tokens": LONGEST,
        "temperature": 0.8,
        "max_concurrency": 1,
        "max_retries": 0,
        "startup_timeout": 0,
    }
    return OpenAIServerGenerator(url, **{**defaults, **settings})


class Nothing(WeightSync):
    """Hands nothing over and says nothing."""

    names_model = False
    on_policy = False

    def hand_over(self, policy: object, *, client: object, model: str | None) -> str:
        assert model is not None
        return model


ONE = [SampleRequest((BOS, *ids_of("Say")), (7,))]


def test_what_a_server_of_token_ids_is_asked() -> None:
    """vLLM takes from the model's generation config what a request leaves open, so nothing is."""
    replay = Completions({**VLLM, "text": "", "finish_reason": "length", "token_ids": [70]})
    request = SampleRequest((BOS, 70, 71), (5, 2**63 - 1, SEEDS + 6))
    settings: dict[str, Any] = {"top_p": 0.9, "stop": ["\n"], "max_total_tokens": 10}
    _, local = asked(replay, [request, SampleRequest((BOS, 70), ())], **settings)
    *drawn, greedy = [one.body for one in local.requests]
    assert drawn[0] == {
        "model": "served",
        "prompt": [BOS, 70, 71],
        "max_tokens": 7,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 5,
        "stop": ["\n"],
        "return_token_ids": True,
    }
    assert [one["seed"] for one in drawn] == [5, 2**31 - 1, 6]
    assert greedy["temperature"] == 0
    assert greedy["max_tokens"] == 8
    assert not {"seed", "top_p", "top_k"} & set(greedy)


def test_what_a_server_of_strings_is_asked() -> None:
    replay = Completions({"text": "ab", "finish_reason": "length"}, prompt_tokens=4, completion_tokens=2)
    (answers,), local = asked(replay, ONE, prompt_format="text", stop=["\n"])
    assert answers == [Response(ids_of("ab"), "ab", "length")]
    assert local.requests[0].body == {
        "model": "served",
        "prompt": "<bos>Say",
        "max_tokens": LONGEST,
        "temperature": 0.8,
        "top_p": 1.0,
        "seed": 7,
    }
    _, local = asked(replay, ONE, prompt_format="text", top_k=3)
    assert local.requests[0].body["top_k"] == 3


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ((*ids_of("hi"), END), Response((*ids_of("hi"), END), "hi", "stop")),
        (ids_of("hi"), Response(ids_of("hi"), "hi", "length")),  # no end is invented
        ((END,), Response((END,), "", "stop")),
        (NO_TEXT, Response(NO_TEXT, "\ufffd", "length")),  # no text, yet exact
        ((*ids_of("hi"), END, *ids_of("more")), Response((*ids_of("hi"), END), "hi", "stop")),
        (ids_of("ab##c"), Response(ids_of("ab##"), "ab", "stop")),
        ((*ids_of("ab##"), END), Response(ids_of("ab##"), "ab", "stop")),
    ],
)
def test_token_ids_are_what_the_server_says(token_ids: tuple[int, ...], expected: Response) -> None:
    choice = {**VLLM, "text": "something else", "finish_reason": "stop", "token_ids": list(token_ids)}
    (answers,), _ = asked(Completions(choice), ONE, stop=["##"])
    assert answers == [expected]


def test_the_prompt_that_the_server_continued_is_checked() -> None:
    choice = {**VLLM, "text": "", "finish_reason": "length", "token_ids": [70]}
    right, wrong = list(ONE[0].token_ids), [BOS, *ONE[0].token_ids]
    refused = [Response((), "", "failed", drop_reason="prompt_retokenised_differently")]
    for ids, expected in ((right, [Response((70,), "@", "length")]), (wrong, refused)):
        (answers,), _ = asked(Completions({**choice, "prompt_token_ids": ids}), ONE)
        assert [(one.token_ids, one.drop_reason) for one in answers] == [
            (one.token_ids, one.drop_reason) for one in expected
        ]
    for count, expected_reason in ((4, None), (5, "prompt_retokenised_differently")):
        for settings in ({}, {"prompt_format": "text"}):
            replay = Completions(
                {"text": "ab", "finish_reason": "length"}, prompt_tokens=count, completion_tokens=2
            )
            ((one,),), _ = asked(replay, ONE, **settings)
            assert one.drop_reason == expected_reason
    for settings, expected_reason in (({}, None), ({"prompt_format": "text"}, refused[0].drop_reason)):
        replay = Completions(
            {"text": "ab", "finish_reason": "length"}, prompt_tokens=None, completion_tokens=2
        )
        ((one,),), _ = asked(replay, ONE, **settings)
        assert one.drop_reason == expected_reason


DROPPED = "retokenised_differently"


@pytest.mark.parametrize(
    ("choice", "count", "expected"),
    [
        ({"text": "hi", "finish_reason": "length"}, 2, ids_of("hi")),
        ({"text": "hi", "finish_reason": "length"}, 1, DROPPED),
        ({"text": "hi", "finish_reason": "length"}, 3, DROPPED),  # no end is invented
        ({"text": "hi", "finish_reason": "stop"}, 3, (*ids_of("hi"), END)),
        (
            {"text": "hi", "finish_reason": "stop"},
            2,
            DROPPED,
        ),  # an end token was sampled, so one letter was not
        ({"text": "hi", "finish_reason": "stop"}, None, DROPPED),
        ({"text": "", "finish_reason": "stop"}, 1, (END,)),
        (
            {"text": "h\ufffd", "finish_reason": "length"},
            4,
            DROPPED,
        ),  # three bytes of an emoji would look the same
        ({"text": "h<pad>", "finish_reason": "length"}, 2, DROPPED),  # spelt out; the tokenizer sees its own
        ({"text": "hi", "finish_reason": "stop", "matched_stop": END}, 3, (*ids_of("hi"), END)),
        ({"text": "hi", "finish_reason": "stop", "matched_stop": "##"}, 3, DROPPED),
        ({"text": "hi", "finish_reason": "stop", "stop_reason": 77}, 3, DROPPED),
    ],
)
def test_text_alone_counts_only_if_its_tokens_are_as_many_as_were_sampled(
    choice: dict[str, Any], count: int | None, expected: tuple[int, ...] | str
) -> None:
    ((found,),), _ = asked(Completions(choice, completion_tokens=count), ONE)
    assert (found.token_ids or found.drop_reason) == expected
    assert (found.drop_reason is None) == (found.finish_reason != "failed")


def test_an_end_token_that_nobody_names_is_not_guessed() -> None:
    """With two end tokens, or where a stop string of one token may have been cut off, the count says too little."""
    choice = {"text": "hi", "finish_reason": "stop"}
    two_ends = Policy(letters_policy().model, end_token_ids=frozenset({END, PAD}))
    ((found,),), _ = asked(Completions(choice, completion_tokens=3), ONE, policy=two_ends)
    assert found.drop_reason == DROPPED
    named = Completions({**choice, "matched_stop": PAD}, completion_tokens=3)
    ((found,),), _ = asked(named, ONE, policy=two_ends)
    assert found.token_ids == (*ids_of("hi"), PAD)
    ((found,),), _ = asked(Completions(choice, completion_tokens=3), ONE, stop=["#"])
    assert found.drop_reason == DROPPED


def choice_of(token_ids: Any, **other: Any) -> dict[str, Any]:
    return {"choices": [{"text": "hi", "finish_reason": "length", "token_ids": token_ids, **other}]}


ROWS = tiny_config().vocab_size


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>", "malformed_answer"),
        ({}, "malformed_answer"),
        ([], "malformed_answer"),
        (None, "malformed_answer"),
        ({"choices": []}, "malformed_answer"),
        ({"choices": 7}, "malformed_answer"),
        ({"choices": ["hi"]}, "malformed_answer"),
        ({"choices": [{"finish_reason": "stop"}]}, "malformed_answer"),
        ({"choices": [{"text": None, "finish_reason": "stop"}]}, "malformed_answer"),
        ({**choice_of([70]), "usage": 7}, "malformed_answer"),
        (choice_of([70], finish_reason="abort"), "server_error"),
        (choice_of([70], finish_reason=["stop"]), "server_error"),
        (choice_of(["70"]), "malformed_answer"),
        (choice_of([70.0]), "malformed_answer"),
        (choice_of([True]), "malformed_answer"),
        (choice_of([None]), "malformed_answer"),
        (choice_of([[70]]), "malformed_answer"),
        (choice_of({"70": 70}), "malformed_answer"),
        (choice_of("70"), "malformed_answer"),
        (choice_of([70, ROWS]), "malformed_answer"),
        (choice_of([-1]), "malformed_answer"),
        (choice_of([10**30]), "malformed_answer"),
        (choice_of([70] * (LONGEST + 1)), "malformed_answer"),
        (choice_of([END] * (LONGEST + 1)), "malformed_answer"),
        (choice_of([70], text="\ud800"), "malformed_answer"),
        (choice_of([70], prompt_token_ids="70"), "malformed_answer"),
        (choice_of(None, stop_reason={"a": 1}), "malformed_answer"),
        (choice_of([]), "server_error"),
    ],
)
def test_one_bad_answer_costs_one_response(body: Any, reason: str) -> None:
    good = Completions({**VLLM, "text": "hi", "finish_reason": "length", "token_ids": [70]})
    asked_so_far = []

    def respond(request: Request) -> Answer:
        asked_so_far.append(request)
        return Answer(200, body) if len(asked_so_far) == 2 else good(request)

    with pytest.warns(UserWarning, match=f"a response is dropped as {reason}"):
        ((first, second, third),), _ = asked(respond, [SampleRequest((70,), (1, 2, 3))])
    assert second == Response((), "", "failed", drop_reason=reason)
    assert [one.token_ids for one in (first, third)] == [(70,), (70,)]


def test_the_last_embedding_is_a_token_and_as_many_as_were_asked_for_are_taken() -> None:
    ((found,),), _ = asked(Completions(choice_of([70] * (LONGEST - 1) + [ROWS - 1])["choices"][0]), ONE)
    assert found.drop_reason is None
    assert len(found.token_ids) == LONGEST


def test_text_whose_tokens_the_policy_lacks_is_dropped() -> None:
    """A tokenizer may have more entries than the policy has embeddings."""
    small = Policy(LlamaForCausalLM(tiny_config(vocab_size=min(ids_of("hi")))))
    with pytest.warns(UserWarning, match="dropped as malformed_answer: the server answered token id"):
        ((found,),), _ = asked(
            Completions({"text": "hi", "finish_reason": "length"}, completion_tokens=2), ONE, policy=small
        )
    assert found.drop_reason == "malformed_answer"


def test_prompts_come_back_whole_as_soon_as_they_are_done() -> None:
    """The first prompt's second response is held back until the second prompt is through."""
    second_done = threading.Event()

    def respond(request: Request) -> Answer:
        if request.body["prompt"] == [70] and request.body["seed"] == 2:
            assert second_done.wait(20)
        token = request.body["seed"]
        return Completions({"text": "", "finish_reason": "length", "token_ids": [token]})(request)

    with serving(respond) as local:
        generator = contract(local.url, max_concurrency=4)
        generator.load(letters_policy())
        answers = generator.generate([SampleRequest((70,), (1, 2)), SampleRequest((71,), (3, 4))])
        first = next(answers)
        second_done.set()
        rest = list(answers)
        generator.unload()
    assert (first.request, [one.token_ids for one in first.responses]) == (1, [(3,), (4,)])
    assert [(one.request, [r.token_ids for r in one.responses]) for one in rest] == [(0, [(1,), (2,)])]


def test_time_outs_are_named() -> None:
    def respond(request: Request) -> Answer:
        if request.body["seed"] == 1:
            time.sleep(1)
        return Completions({"text": "", "finish_reason": "length", "token_ids": [70]})(request)

    with pytest.warns(UserWarning, match="dropped as server_time_out: .* gave no answer within 0.3 s"):
        ((slow, fast),), _ = asked(respond, [SampleRequest((70,), (1, 2))], timeout=0.3)
    assert (slow.drop_reason, fast.drop_reason) == ("server_time_out", None)


# ------------------------------------------------------------------------- prompts


def tokenizer_that_adds_bos() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def test_a_prompt_keeps_its_single_bos_on_the_way() -> None:
    prompt = (BOS, *ids_of("Say"))
    for tokenizer, text in ((byte_tokenizer(), "<bos>Say"), (tokenizer_that_adds_bos(), "Say")):
        assert prompt_text(prompt, tokenizer) == text
        assert tokenizer(text)["input_ids"] == list(prompt)
    assert prompt_text(prompt[1:], tokenizer_that_adds_bos()) is None
    assert prompt_text((BOS, *prompt), byte_tokenizer()) == "<bos><bos>Say"  # two in, two out: never one more


def test_a_server_whose_tokenizer_adds_the_bos_sees_one(transformers_serve: str, tmp_path: Path) -> None:
    policy = Policy(letters_policy().model, tokenizer=tokenizer_that_adds_bos())
    generator = served(transformers_serve, tmp_path)
    generator.load(policy)
    assert answer(generator, GREEDY) == in_process(policy, GREEDY)


def test_a_prompt_that_is_no_text_is_never_sent() -> None:
    replay = Completions({"text": "", "finish_reason": "length"})
    (answers,), local = asked(replay, [SampleRequest(NO_TEXT, (1, 2))], prompt_format="text")
    assert answers == [Response((), "", "failed", drop_reason="prompt_retokenised_differently")] * 2
    assert local.requests == []


# --------------------------------------------------------------------- weight sync


class WeightServer:
    """vLLM's adapters and SGLang's weights, as their documentation has them."""

    def __init__(self, *loaded: str, refuses: str | None = None) -> None:
        self.loaded = list(loaded)
        self.refuses = refuses
        self.posts: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, request: Request) -> Answer:
        if request.path == "/v1/models":
            return Answer(200, {"object": "list", "data": [{"id": name} for name in ["base", *self.loaded]]})
        self.posts.append((request.path, request.body))
        if self.refuses is not None:
            error = {"message": self.refuses, "type": "InternalServerError", "code": 500}
            return Answer(400 if "disk" in request.path else 500, {"error": error, "success": False, **error})
        if request.path == "/update_weights_from_disk":
            return Answer(200, {"success": True, "message": "Succeeded.", "num_paused_requests": 0})
        name = request.body["lora_name"]
        if request.path == "/v1/load_lora_adapter":
            assert (Path(request.body["lora_path"]) / "adapter_config.json").exists()
            self.loaded.append(name)
            return Answer(200, f"Success: LoRA adapter '{name}' added successfully.")
        if name not in self.loaded:
            return Answer(404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}})
        self.loaded.remove(name)
        return Answer(200, f"Success: LoRA adapter '{name}' removed successfully.")


class AdapterPolicy(Policy):
    """A policy that exports an adapter."""

    def export(self, folder: Path) -> None:
        self.exports += 1
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")


def handed_over(
    sync: WeightSync, server: WeightServer, *policies: Policy, model: str | None = None
) -> list[str]:
    """Hand policies over one after the other and return the names to ask for."""
    sync.on_policy = False  # type: ignore[misc]  # these servers sample nothing
    with serving(server) as local:
        names = []
        for policy in policies:
            generator = contract(local.url, weight_sync=sync, model=model)
            generator.load(policy)
            names.extend(generator._asked_models.values())
            generator.unload()
    return names


def test_every_policy_gets_an_adapter_name_of_its_own(tmp_path: Path) -> None:
    first, second = (AdapterPolicy(letters_policy(seed).model) for seed in (0, 1))
    server = WeightServer("policy-00ff", "policy-of-others-00ff", "other-00ff")
    names = handed_over(VLLMAdapter(str(tmp_path)), server, first, first, second)
    assert names == [f"policy-{one.fingerprint()}" for one in (first, first, second)]
    assert [path for path, _ in server.posts] == [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ]
    assert server.posts[0][1] == {"lora_name": names[0], "lora_path": str(tmp_path / names[0])}
    assert sorted(server.loaded) == sorted(["policy-of-others-00ff", "other-00ff", names[2]])
    assert (first.exports, second.exports) == (1, 1)


def test_an_adapter_that_another_process_loads_or_unloads_meanwhile_is_no_error(tmp_path: Path) -> None:
    policy = AdapterPolicy(letters_policy().model)
    name = f"policy-{policy.fingerprint()}"

    class Faster(WeightServer):
        def __call__(self, request: Request) -> Answer:
            if request.path == "/v1/load_lora_adapter":
                self.loaded[:] = [name]  # the older one is gone as well
                return Answer(400, {"error": {"message": "has already been loaded"}})
            return super().__call__(request)

    assert handed_over(VLLMAdapter(str(tmp_path)), Faster("policy-00ff"), policy) == [name]


def test_a_server_that_does_not_take_an_adapter(tmp_path: Path) -> None:
    policy = AdapterPolicy(letters_policy().model)
    with pytest.raises(
        UserError,
        match=r"VLLMAdapter: the server does not take the adapter .*rank 64.*--enable-lora, a --max-lora",
    ):
        handed_over(VLLMAdapter(str(tmp_path)), WeightServer(refuses="rank 64 is greater than 16"), policy)
    with pytest.raises(UserError, match=r"VLLMAdapter needs an adapter, but .*: set model.policy.lora"):
        handed_over(VLLMAdapter(str(tmp_path)), WeightServer(), letters_policy(1))


def test_a_server_that_lists_no_models(tmp_path: Path) -> None:
    policy = AdapterPolicy(letters_policy().model)
    with serving(lambda request: Answer(200, "<html>")) as local:
        generator = contract(local.url, weight_sync=VLLMAdapter(str(tmp_path)), model=None)
        with pytest.raises(UserError, match=r"/v1/models lists no models \(.*<html>\): correct base_url"):
            generator.load(policy)
    for models in ({"data": [{"name": "x"}]}, {"data": ["x"]}, {"data": None}, [], 7):
        with serving(lambda request, models=models: Answer(200, models)) as local:  # type: ignore[misc]
            generator = contract(local.url, weight_sync=VLLMAdapter(str(tmp_path)), model=None)
            with pytest.raises(UserError, match=r"/v1/models lists no models \(.*cannot be read"):
                generator.load(policy)


def test_sglang_reads_the_weights_and_forgets_its_cache(tmp_path: Path) -> None:
    server, policy = WeightServer(), letters_policy()
    assert handed_over(SGLangWeights(str(tmp_path)), server, policy, model="served") == ["served"]
    place = tmp_path / f"policy-{policy.fingerprint()}"
    assert server.posts == [("/update_weights_from_disk", {"model_path": str(place), "flush_cache": True})]
    assert (place / "model.safetensors").exists()
    assert (place / "tokenizer.json").exists()


def test_a_server_that_does_not_take_the_weights(tmp_path: Path) -> None:
    sync = SGLangWeights(str(tmp_path))
    with pytest.raises(
        UserError, match=r"SGLangWeights: the server does not take the weights .*no such shape"
    ):
        handed_over(sync, WeightServer(refuses="no such shape"), letters_policy(), model="served")
    with serving(lambda request: Answer(200, {"success": False, "message": "busy"})) as local:
        generator = contract(local.url, weight_sync=sync)
        with pytest.raises(UserError, match=r"does not take the weights .*busy"):
            generator.load(letters_policy())


@pytest.mark.parametrize("sync", [ModelFolder, SGLangWeights])
def test_an_adapter_is_no_whole_model(sync: type[ModelFolder | SGLangWeights], tmp_path: Path) -> None:
    policy = AdapterPolicy(letters_policy().model)
    model = None if sync.names_model else "served"
    with pytest.raises(UserError, match="needs the whole model, but the policy exports an adapter: leave"):
        handed_over(sync(str(tmp_path)), WeightServer(), policy, model=model)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_made_once_and_replaces_older_ones(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    first, second = letters_policy(0), letters_policy(1)
    for name in ("policy-old", "policy-old.0123", f"policy-{first.fingerprint()}.0123"):
        (tmp_path / name).mkdir()
    (path,) = handed_over(ModelFolder(str(tmp_path)), WeightServer(), first)
    assert path == str(tmp_path / f"policy-{first.fingerprint()}")
    unfinished = f"policy-{first.fingerprint()}.0123"  # may be another process's that makes the same export
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine", Path(path).name, unfinished]
    again = handed_over(ModelFolder(str(tmp_path)), WeightServer(), first, second)
    assert (first.exports, second.exports) == (1, 1)
    assert again[0] == path
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine", Path(again[1]).name]


def test_half_an_export_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    policy = letters_policy()

    def fail(fresh: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        exported(policy, tmp_path, prepare=fail)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_export_the_same_policy(tmp_path: Path) -> None:
    policy = letters_policy()

    def overtaken(fresh: Path) -> None:
        other = tmp_path / f"policy-{policy.fingerprint()}"
        other.mkdir()
        (other / "config.json").write_text("theirs")

    place = exported(policy, tmp_path, prepare=overtaken)
    assert (place / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [place]


def test_a_served_folder_samples_from_the_plain_distribution(tmp_path: Path) -> None:
    """Whatever the policy's own generation config says; without do_sample the server would not sample at all."""
    policy = letters_policy()
    policy.end_token_ids = frozenset({END, 70})
    policy.model.generation_config = GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.1, pad_token_id=PAD
    )
    (path,) = handed_over(ModelFolder(str(tmp_path)), WeightServer(), policy)
    found = GenerationConfig.from_pretrained(path)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 1.0, 0, 1.0)
    assert (found.eos_token_id, found.pad_token_id) == ([END, 70], PAD)
    assert "repetition_penalty" not in json.loads((Path(path) / "generation_config.json").read_text())


# ------------------------------------------------------------------------ settings


def test_the_class_is_chosen_in_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Generator, "generator")
    place = "sppo_lightning.generation"
    config = {
        "class_path": f"{place}.server.OpenAIServerGenerator",
        "init_args": {
            "base_url": "http://localhost:8000/v1",
            "weight_sync": {
                "class_path": f"{place}.weight_sync.ModelFolder",
                "init_args": {"folder": str(tmp_path)},
            },
            "prompt_format": "text",
            "max_new_tokens": 16,
            "temperature": 0.8,
            "stop": ["\n"],
        },
    }
    generator = parser.instantiate(parser.parse_object({"generator": config}))["generator"]
    assert isinstance(generator, OpenAIServerGenerator)
    assert isinstance(generator.weight_sync, ModelFolder)
    assert (generator.max_new_tokens, generator.stop) == (16, ["\n"])
    assert not generator.reproducible
    generator.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weight_sync": OffPolicy(), "model": None},
            "model is missing: OffPolicy needs the name of the served",
        ),
        (
            {"weight_sync": ModelFolder("x")},
            "model='served' would not be asked for: ModelFolder names the model",
        ),
        (
            {"weight_sync": VLLMAdapter("x")},
            "model='served' would not be asked for: VLLMAdapter names the model",
        ),
        ({"temperature": 0}, r"OpenAIServerGenerator.temperature=0 must be greater than 0"),
        ({"max_concurrency": 0}, r"data.generator.max_concurrency=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contract("http://localhost:8000/v1", **settings)


def test_folders_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"ModelFolder.folder='.*a@b' must not contain @"):
        ModelFolder("a@b")
    with pytest.raises(ValueError, match=r"VLLMAdapter.adapter must not be empty"):
        VLLMAdapter("x", adapter="")


def test_off_policy_is_said_once() -> None:
    with pytest.warns(UserWarning, match="off-policy") as said:
        handed_over(OffPolicy(), WeightServer(), letters_policy(), letters_policy(), model="served")
    assert len(said) == 1
