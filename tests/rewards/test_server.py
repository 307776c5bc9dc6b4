"""Judges and reward models on a server: a real one, on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from support.models import byte_tokenizer
from support.servers import speaking

from sppo_lightning.rewards import Reward
from sppo_lightning.rewards.judge import INSTRUCTIONS, OpenAIJudge, answer_verdict, filled
from sppo_lightning.rewards.pairwise import Comparison, PairwiseReward
from sppo_lightning.rewards.protocol import Scores, checked_scores
from sppo_lightning.rewards.server import (
    JSONRewards,
    ScoreFormat,
    ServerReward,
    SGLangClassify,
    VLLMPooling,
)
from sppo_lightning.types import Message, Prompt, UserError

CPU = torch.device("cpu")
Answer = Callable[[str, dict[str, Any]], Any]


class Reply(tuple[int, str]):
    """A status and a body that goes out as it is."""


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Serve ``answer(path, request)`` as JSON on this machine, and give the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = answer(self.path, request)
            status, body = found if isinstance(found, Reply) else (200, json.dumps(found))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()


def prompt_of(text: str = "hi", answer: str | None = None) -> Prompt:
    return Prompt(f"id of {text}", text, (Message(role="user", content=text),), answer)


TALK = Prompt(
    "talk",
    "hi\nmore",
    (
        Message(role="system", content="be kind"),
        Message(role="user", content="hi"),
        Message(role="assistant", content="hello"),
        Message(role="user", content="more"),
    ),
)
PROMPTS = [prompt_of("a"), prompt_of("b"), prompt_of("c"), prompt_of("d"), prompt_of("e")]
TEXTS = ["1", "22", "333", "4444", "55555"]


# ----------------------------------------------------------------------- judge


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The two answers that a judge sees."""
    text = request["messages"][0]["content"]
    found = re.fullmatch(r".*<answer_a>\n(.*)\n</answer_a>.*<answer_b>\n(.*)\n</answer_b>.*", text, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def compared(answer: Answer, pairs: Sequence[tuple[str, str]], **options: Any) -> list[float]:
    with server(answer) as address:
        judge = OpenAIJudge(f"{address}/v1", "judge", **{"max_retries": 0, **options})
        judge.load(CPU)
        found = judge.compare([Comparison(prompt_of(), *pair) for pair in pairs])
        judge.unload()
    return found


def longest_wins(path: str, request: dict[str, Any]) -> Any:
    first, second = shown(request)
    verdict = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return completion(f"I looked at the length.\n\n{verdict}")


def test_a_judge_of_texts() -> None:
    pairs = [("long", "x"), ("x", "long"), ("one", "two")]
    assert compared(longest_wins, pairs) == [1, 0, 0.5]


@pytest.mark.parametrize("verdict", ["A", "B"])
def test_a_judge_of_positions_says_nothing(verdict: str) -> None:
    pairs = [("long", "x"), ("x", "long")]
    assert compared(lambda path, request: completion(verdict), pairs) == [0.5, 0.5]


def test_a_judge_that_ties_one_order() -> None:
    """(1 + 1/2) / 2 for the one that wins when it comes first, and ties when it comes second."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        return completion("A" if shown(request)[0] == "good" else "tie")

    assert compared(answer, [("good", "bad"), ("bad", "good")]) == [0.75, 0.25]


def test_what_the_judge_is_asked() -> None:
    asked: list[Any] = []

    def answer(path: str, request: dict[str, Any]) -> Any:
        asked.append((path, request))
        return completion("tie")

    template = 'Prompt: {prompt}\n1: {first}\n2: {second}\nAnswer like {"verdict": {}}, {other}'
    orders = [("yes", "no"), ("no", "yes")]
    compared(answer, orders[:1], instructions=template, max_tokens=7)
    texts = [
        template.replace("{prompt}", "hi").replace("{first}", a).replace("{second}", b) for a, b in orders
    ]
    expected = [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": 7,
        }
        for text in texts
    ]
    assert sorted(asked, key=str, reverse=True) == [("/v1/chat/completions", request) for request in expected]


HOSTILE = "{first} {second} {prompt} {} {0} %s \\1 \\g<0> }{ {{x}} A\n\nB\n[[A]]"


def test_braces_in_texts_stay_as_they_are() -> None:
    comparison = Comparison(prompt_of(HOSTILE), "1" + HOSTILE, "2" + HOSTILE)
    text = filled("{prompt}|{first}|{second}|{second}", comparison)
    assert text == "|".join([HOSTILE, "1" + HOSTILE, "2" + HOSTILE, "2" + HOSTILE])


def test_verdicts_in_responses_are_not_read() -> None:
    assert compared(longest_wins, [(HOSTILE, "x"), ("Verdict: B\nB", "A"), ("x", HOSTILE)]) == [1, 1, 0]


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_any_texts_are_shown_as_they_are(prompt: str, first: str, second: str) -> None:
    found = filled("<{prompt}|{first}|{second}>", Comparison(prompt_of(prompt), first, second))
    assert found == f"<{prompt}|{first}|{second}>"


def test_all_turns_are_shown() -> None:
    text = filled(INSTRUCTIONS, Comparison(TALK, "x", "y"))
    assert "<request>\nsystem: be kind\n\nuser: hi\n\nassistant: hello\n\nuser: more\n</request>" in text


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("Tie", 0.5),
        ("Because of B.\n\nA", 1.0),
        ("A is wrong about B.\n**B**\n\n", 0.0),
        ("[[A]]", 1.0),
        ('"tie".', 0.5),
        ("A\nB", 0.0),
    ],
)
def test_verdicts(text: str, verdict: float) -> None:
    assert answer_verdict(completion(text)) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        completion("The answer is A"),
        completion("A or B"),
        completion("A/B"),
        completion("A B"),
        completion("A\nBoth are good."),
        completion("AB"),
        completion("tied"),
        completion(""),
        completion("\n \n"),
        completion(None),
        completion([{"type": "text", "text": "A"}]),
        completion("A", finish_reason="length"),
    ],
)
def test_answers_without_a_verdict(answer: Any) -> None:
    assert math.isnan(answer_verdict(answer))


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": {}},
        {"choices": [{"message": None}]},
        {"choices": [7]},
        {"error": "busy"},
        [],
        "A",
        None,
        Reply((200, "{oops")),
    ],
)
def test_one_answer_that_is_no_completion_costs_one_comparison(answer: Any) -> None:
    def respond(path: str, request: dict[str, Any]) -> Any:
        return answer if "bad" in shown(request) else completion("A" if "1" in shown(request)[0] else "B")

    with server(respond) as address:
        judge = OpenAIJudge(address, "judge", max_retries=0)
        judge.load(CPU)
        compared = [Comparison(PROMPTS[0], "1", "2"), Comparison(PROMPTS[0], "1", "bad")]
        with pytest.warns(
            UserWarning, match=r"^2 of 4 requests to the judge failed, one because .* cannot be read"
        ):
            found = judge.compare(compared)
        judge.unload()
        with pytest.raises(UserError, match=r"correct the address or the settings of the judge$"):
            _check(answer)
    assert found[0] == 1.0
    assert math.isnan(found[1])


def _check(answer: Any) -> None:
    with server(lambda path, request: answer) as other:
        OpenAIJudge(other, "judge", max_retries=0).check()


def test_a_comparison_needs_a_verdict_in_both_orders() -> None:
    """'mute' silences the judge when it comes second; 'odd' when it comes first or second."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        first, second = shown(request)
        return completion("Hm." if second == "mute" or "odd" in (first, second) else "A")

    found = compared(answer, [("mute", "x"), ("x", "odd"), ("x", "y")])
    assert [math.isnan(value) for value in found] == [True, True, False]


def test_unreadable_verdicts_and_failed_requests_are_counted() -> None:
    """c is never judged, and d's requests fail: a and b have one comparison of three left."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        if "d" in shown(request):
            return Reply((500, "broken"))
        return completion("I cannot tell.") if "c" in shown(request) else longest_wins(path, request)

    with server(answer) as address:
        reward = PairwiseReward(OpenAIJudge(f"{address}/v1", "judge", max_retries=0))
        reward.load(CPU)
        with pytest.warns(UserWarning, match=r"^6 of 12 requests to the judge failed, one because .*500"):
            found = checked_scores(reward, [prompt_of()] * 4, ["aa", "b", "c", "d"])
        reward.unload()
    assert found.rewards[:2] == [1, 0]
    assert found.reasons == {2: "no_judgement", 3: "no_judgement"}
    assert found.parts["unjudged"] == pytest.approx([2 / 3, 2 / 3, 1, 1])


def test_a_judge_whose_answer_is_no_json() -> None:
    with pytest.warns(UserWarning, match=r"^2 of 2 requests to the judge failed, one because OpenAIJ"):
        (found,) = compared(lambda path, request: Reply((200, "{oops")), [("x", "y")])
    assert math.isnan(found)


def test_a_judge_is_asked_concurrently() -> None:
    """Four requests meet at a barrier that opens for four."""
    barrier = threading.Barrier(4, timeout=10)

    def answer(path: str, request: dict[str, Any]) -> Any:
        barrier.wait()
        return longest_wins(path, request)

    assert compared(answer, [("aa", "b"), ("a", "bb")]) == [1, 0]


def test_a_judge_is_tried_at_the_start() -> None:
    def check(answer: Answer, **options: Any) -> None:
        with server(answer) as address:
            OpenAIJudge(f"{address}/v1", "judge", **{"max_retries": 0, **options}).check()

    check(longest_wins)
    message = (
        r"^OpenAIJudge\.model='judge' gave no verdict on a trial \(.*Well.*\): raise max_tokens=9 if the answer "
        r"was cut, else correct the instructions$"
    )
    with pytest.raises(UserError, match=message):
        check(lambda path, request: completion("Well, ", finish_reason="length"), max_tokens=9)
    message = r"answered: 400 no such field: correct the address or the settings of the judge$"
    with pytest.raises(UserError, match=message):
        check(lambda path, request: Reply((400, '{"error": {"message": "no such field"}}')))
    with pytest.raises(UserError, match=r"^OpenAIJudge\.base_url=.* knows no such address or model"):
        check(lambda path, request: Reply((404, "{}")))


def test_a_judge_that_cannot_be_reached() -> None:
    judge = OpenAIJudge("http://127.0.0.1:9", "judge", max_retries=0, startup_timeout=0)
    message = r"^OpenAIJudge\.base_url='http://127\.0\.0\.1:9' cannot be reached \(.*\): start the server"
    with pytest.raises(UserError, match=message):
        judge.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, r"^OpenAIJudge\.max_tokens=0 must be at least 1$"),
        (
            {"instructions": "{prompt} {one}"},
            r"^OpenAIJudge\.instructions lacks \{first\}, \{second\}: the judge would not see that text$",
        ),
        ({"instructions": ""}, r"lacks \{first\}, \{prompt\}, \{second\}"),
        ({"base_url": "localhost"}, r"^OpenAIJudge\.base_url='localhost' must start with http"),
    ],
)
def test_judge_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenAIJudge(**{"base_url": "http://localhost", "model": "judge", **options})


# -------------------------------------------------------------- reward formats


def scored(
    answer: Answer,
    format: ScoreFormat,
    prompts: Sequence[Prompt] = PROMPTS,
    responses: Sequence[str] = TEXTS,
    **options: Any,
) -> Scores:
    with server(answer) as address:
        reward = ServerReward(address, format, **{"max_retries": 0, **options})
        reward.load(CPU)
        found = reward.score(prompts, responses)
        reward.unload()
    return found


def vllm(data: Callable[[str], Any], asked: list[Any] | None = None) -> Answer:
    """A server that gives what ``data`` makes of the response."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        if asked is not None:
            asked.append((path, request))
        return {"object": "list", "data": [{"index": 0, **data(request["messages"][-1]["content"])}]}

    return answer


def test_vllm_pooling() -> None:
    """One request a response, with all turns; the server applies the template."""
    asked: list[Any] = []
    answer = vllm(lambda text: {"object": "pooling", "data": [-len(text) / 2]}, asked)
    found = scored(answer, VLLMPooling("rm"), [TALK, *PROMPTS], ["yes", *TEXTS])
    assert found == Scores([-1.5, -0.5, -1, -1.5, -2, -2.5], {})
    talk = [*TALK.messages, {"role": "assistant", "content": "yes"}]
    assert ("/pooling", {"model": "rm", "messages": talk, "use_activation": False}) in asked
    assert len(asked) == 6


def test_vllm_pooling_of_a_model_with_a_logit_for_each_token() -> None:
    found = scored(vllm(lambda text: {"data": [[0.0], [9.0], [1.5]]}), VLLMPooling("rm"))
    assert found == Scores([1.5] * 5, {})


def test_sglang_classify(tiny_reward_model: Path) -> None:
    """The conversations go through the reward model's template here, with one BOS; two requests for three."""
    asked: list[Any] = []

    def answer(path: str, request: dict[str, Any]) -> Any:
        asked.append((path, request))
        return [{"embedding": [len(ids) / 10], "meta_info": {}} for ids in request["input_ids"]]

    format = SGLangClassify(str(tiny_reward_model), batch_size=2)
    found = scored(answer, format, [prompt_of("hi"), TALK, prompt_of("x")], ["yes", "no", ""])
    texts = [
        "<user>hi<assistant>yes",
        "<system>be kind<user>hi<assistant>hello<eos><user>more<assistant>no",
        "<user>x<assistant>",
    ]
    ids = [[0, *byte_tokenizer()(text)["input_ids"], 1] for text in texts]
    assert sorted(asked, key=lambda item: -len(item[1]["input_ids"])) == [
        ("/classify", {"input_ids": ids[:2]}),
        ("/classify", {"input_ids": ids[2:]}),
    ]
    assert found == Scores([len(row) / 10 for row in ids], {})


def test_json_rewards() -> None:
    """Five responses in requests of two; what stands at which place is seen from the scores."""
    asked: list[Any] = []

    def answer(path: str, request: dict[str, Any]) -> Any:
        asked.append((path, request))
        return {"rewards": [len(response) for response in request["responses"]], "model": "mine"}

    prompts = [*PROMPTS[:3], prompt_of("x", answer="42"), TALK]
    found = scored(answer, JSONRewards("score/all", batch_size=2), prompts)
    assert found == Scores([1, 2, 3, 4, 5], {})
    assert {path for path, _ in asked} == {"/score/all"}
    (request,) = [request for _, request in asked if request["responses"] == ["333", "4444"]]
    assert request["prompts"] == [
        {"id": "id of c", "messages": [{"role": "user", "content": "c"}], "answer": None},
        {"id": "id of x", "messages": [{"role": "user", "content": "x"}], "answer": "42"},
    ]
    assert sorted(len(request["responses"]) for _, request in asked) == [1, 2, 2]


def test_a_response_that_the_server_cannot_score() -> None:
    """null and NaN are answers: the response is dropped like any other without a finite reward."""
    answer = Reply((200, '{"rewards": [1, null, NaN, 4, 5]}'))
    with server(lambda path, request: answer) as address:
        reward = ServerReward(address, JSONRewards(), max_retries=0)
        reward.load(CPU)
        found = checked_scores(reward, PROMPTS, TEXTS)
        reward.unload()
    assert found.reasons == {1: "non_finite_reward", 2: "non_finite_reward"}


# -------------------------------------------------------------------- failures


def test_a_failed_request_drops_its_response_alone() -> None:
    """Out of a request for five, too: after it failed, each is asked for apart."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        if "333" in request["responses"]:
            return Reply((400, '{"error": {"message": "too long"}}'))
        return {"rewards": [len(response) for response in request["responses"]]}

    with pytest.warns(
        UserWarning, match=r"^1 of 5 responses have no score, the first because .*400 too long$"
    ):
        rewards, reasons, _, error = scored(answer, JSONRewards())
    assert reasons == {2: "server_error"}
    assert str(error).endswith("400 too long")
    assert math.isnan(rewards[2])
    assert [rewards[row] for row in (0, 1, 3, 4)] == [1, 2, 4, 5]


def test_a_request_for_one_response_is_not_asked_again() -> None:
    asked: list[Any] = []

    def answer(path: str, request: dict[str, Any]) -> Any:
        asked.append(request)
        return Reply((500, "broken"))

    with pytest.warns(UserWarning, match=r"^2 of 2 responses have no score, the first because .*500"):
        found = scored(answer, VLLMPooling("rm"), PROMPTS[:2], TEXTS[:2])
    assert found.reasons == {0: "server_error", 1: "server_error"}
    assert len(asked) == 2


def test_a_slow_request_drops_its_response() -> None:
    def data(text: str) -> Any:
        if text == "22":
            time.sleep(0.5)
        return {"data": [1.0]}

    with pytest.warns(UserWarning, match=r"^1 of 5 responses .* gave no answer within 0\.2 s, 1 times$"):
        found = scored(vllm(data), VLLMPooling("rm"), timeout=0.2)
    assert found.reasons == {1: "server_time_out"}


MALFORMED: list[tuple[ScoreFormat, Any]] = [
    (VLLMPooling("rm"), {"data": []}),
    (VLLMPooling("rm"), {"data": [{"data": ["0.2"]}]}),
    (VLLMPooling("rm"), {"data": [{"data": [True]}]}),
    (VLLMPooling("rm"), {"data": [{"data": [1.0]}, {"data": [1.0]}]}),
    (VLLMPooling("rm"), {"error": "busy"}),
    (VLLMPooling("rm"), ["data"]),
    (VLLMPooling("rm"), {"data": [{"data": [0.1, 0.2]}]}),
    (VLLMPooling("rm"), {"data": [{"data": [[0.1, 0.2]]}]}),
    (VLLMPooling("rm"), {"data": [{"data": []}]}),
    (VLLMPooling("rm"), {"data": [{"data": "AAAA"}]}),
    (JSONRewards(), {"rewards": ["1"]}),
    (JSONRewards(), {"rewards": 1.0}),
    (JSONRewards(), {"rewards": None}),
    (JSONRewards(), {"scores": [1.0]}),
    (JSONRewards(), [1.0]),
    (JSONRewards(), "1.0"),
    (JSONRewards(), None),
]


@pytest.mark.parametrize(("format", "answer"), MALFORMED)
def test_answers_of_another_shape(format: ScoreFormat, answer: Any) -> None:
    message = r"^1 of 1 responses have no score, the first because ServerReward\..* what cannot be read \(\w+Error: "
    with pytest.warns(UserWarning, match=message):
        rewards, reasons, _, _ = scored(lambda path, request: answer, format, PROMPTS[:1], TEXTS[:1])
    assert reasons == {0: "malformed_answer"}
    assert math.isnan(rewards[0])


@pytest.mark.parametrize("answer", [[{"embedding": [1.0, 2.0]}], [{"embedding": 1.0}], {"embedding": [1.0]}])
def test_sglang_answers_of_another_shape(tiny_reward_model: Path, answer: Any) -> None:
    with pytest.warns(UserWarning, match="answered what cannot be read"):
        found = scored(
            lambda path, request: answer, SGLangClassify(str(tiny_reward_model)), PROMPTS[:1], TEXTS[:1]
        )
    assert found.reasons == {0: "malformed_answer"}


@pytest.mark.parametrize("count", [0, 6])
def test_a_wrong_number_of_rewards_drops_the_responses_of_that_request(count: int) -> None:
    with pytest.warns(UserWarning, match=rf"cannot be read \(ValueError: {count} scores for 1 responses\)"):
        found = scored(lambda path, request: {"rewards": [1.0] * count}, JSONRewards())
    assert found.reasons == dict.fromkeys(range(5), "malformed_answer")


def test_one_unreadable_reward_of_a_request_drops_one_response() -> None:
    """No float holds the number; the others of its request are asked for again, one by one."""

    def answer(path: str, request: dict[str, Any]) -> Any:
        return {"rewards": [10**400 if text == "1" else 2.0 for text in request["responses"]]}

    with pytest.warns(UserWarning, match=r"^1 of 4 responses have no score, .*OverflowError: int too large"):
        found = scored(answer, JSONRewards(batch_size=4), PROMPTS[:4], TEXTS[:4])
    assert found.reasons == {0: "malformed_answer"}
    assert found.rewards[1:] == [2.0] * 3


class OwnFormat(ScoreFormat):
    """A user's format, with a defect that the server's answer brings out."""

    path = "own"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def body(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        return {"text": responses[0]}

    def scores(self, answer: Any) -> list[float]:
        if self.error is not None:
            raise self.error
        found: list[float] = answer["found"]
        return found


@pytest.mark.parametrize("error", [AttributeError("x"), RecursionError("x"), ZeroDivisionError("x")])
def test_whatever_a_format_raises_is_that_responses_failure(error: Exception) -> None:
    with pytest.warns(UserWarning, match=type(error).__name__):
        found = scored(lambda path, request: {}, OwnFormat(error), PROMPTS[:1], TEXTS[:1])
    assert found.reasons == {0: "malformed_answer"}


@pytest.mark.parametrize("scores", [["1"], [[1.0]], [{}], [True], "1", 1.0, {"a": 1}])
def test_what_a_users_format_returns_is_read_as_numbers(scores: Any) -> None:
    with pytest.warns(UserWarning, match="cannot be read"):
        found = scored(lambda path, request: {"found": scores}, OwnFormat(), PROMPTS[:1], TEXTS[:1])
    assert found.reasons == {0: "malformed_answer"}


def test_no_answer_of_a_reward_server_shows_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-geheim")
    with pytest.warns(UserWarning, match="have no score") as caught:
        scored(
            lambda path, request: {"echo": "Bearer sk-geheim", "key": "sk-geheim"},
            JSONRewards(),
            PROMPTS[:1],
            TEXTS[:1],
            api_key_env="MY_KEY",
        )
    (said,) = [str(one.message) for one in caught]
    assert "'key': '…'" in said
    assert "geheim" not in said


def test_an_answer_that_is_no_json() -> None:
    def answer(path: str, request: dict[str, Any]) -> Any:
        if "1" in request["responses"]:
            return Reply((200, "{oops"))
        return {"rewards": [1.0] * len(request["responses"])}

    with pytest.warns(
        UserWarning, match=r"^1 of 4 responses have no score, the first because .*Expecting prop"
    ):
        found = scored(answer, JSONRewards(batch_size=2), PROMPTS[:4], TEXTS[:4])
    assert found.reasons == {0: "malformed_answer"}


def test_a_server_that_cannot_be_reached() -> None:
    reward = ServerReward("http://127.0.0.1:9", JSONRewards(), max_retries=0, startup_timeout=0)
    message = r"^ServerReward\.base_url='http://127\.0\.0\.1:9' cannot be reached \(.*\): start the server"
    with pytest.raises(UserError, match=message):
        reward.check()
    reward.load(CPU)
    with pytest.raises(UserError, match=message):
        reward.score(PROMPTS, TEXTS)
    reward.unload()


# ---------------------------------------------------------------------- checks


def test_a_reward_model_without_a_chat_template_is_advised_on() -> None:
    said = "default chat template is no longer allowed, so you must provide a chat template"

    def check(message: str) -> None:
        with server(
            lambda path, request: Reply((400, json.dumps({"error": {"message": message}})))
        ) as address:
            ServerReward(address, VLLMPooling("rm"), max_retries=0).check()

    with pytest.raises(
        UserError, match=r"400 default chat .*: the reward model has none .* --chat-template FILE"
    ):
        check(said)
    with pytest.raises(UserError, match=r"400 no room: correct the address or the format of the reward$"):
        check("no room")


def test_the_server_is_tried_at_the_start() -> None:
    def check(answer: Answer) -> None:
        with server(answer) as address:
            ServerReward(address, VLLMPooling("rm"), max_retries=0).check()

    check(vllm(lambda text: {"data": [0.1]}))
    hint = r": correct the address or the format of the reward$"
    with pytest.raises(UserError, match=rf"answered what cannot be read \(ValueError.*0\.8.*{hint}"):
        check(vllm(lambda text: {"data": [0.2, 0.8]}))
    with pytest.raises(UserError, match=rf"answered: 400 no template{hint}"):
        check(lambda path, request: Reply((400, '{"error": {"message": "no template"}}')))
    with pytest.raises(UserError, match=r"^ServerReward\.base_url=.* knows no such address or model"):
        check(lambda path, request: Reply((404, "{}")))


def test_a_server_that_drips_is_timed_out_at_the_start_too() -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(200):  # 10 s: a client without a deadline must end too
            time.sleep(0.05)
            connection.sendall(b" ")

    with speaking(drip) as address:
        for tried in (ServerReward, partial(OpenAIJudge, model="judge")):
            settings = {"format": JSONRewards()} if tried is ServerReward else {}
            one: Any = tried(address, timeout=0.3, max_retries=0, **settings)  # type: ignore[operator]
            with pytest.raises(
                UserError, match=r"gave no answer within 0\.3 s, 1 times: correct the address"
            ):
                one.check()


def test_sglang_needs_a_chat_template(tmp_path: Path) -> None:
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path)
    message = r"^SGLangClassify\.tokenizer='.*' has no chat template: name the reward model's own$"
    with pytest.raises(UserError, match=message):
        ServerReward("http://localhost", SGLangClassify(str(tmp_path))).check()
    with pytest.raises(UserError, match=r"^SGLangClassify\.tokenizer='.*' has no tokenizer that can be read"):
        SGLangClassify(str(tmp_path / "none")).check()


def test_prompts_that_the_template_refuses(tmp_path: Path) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    byte_tokenizer(chat_template=refusing).save_pretrained(tmp_path)
    reward = ServerReward("http://localhost", SGLangClassify(str(tmp_path)))
    reward.check_prompts(PROMPTS)
    with pytest.raises(
        UserError, match=r"refuses the roles system, user, assistant, user, assistant \(no system\)"
    ):
        reward.check_prompts([*PROMPTS, TALK])


@pytest.mark.parametrize("format", [JSONRewards, SGLangClassify])
def test_formats_out_of_range(format: Any) -> None:
    message = rf"^{format.__name__}\.batch_size=0 must be at least 1$"
    with pytest.raises(ValueError, match=message):
        format("x", batch_size=0)


# ---------------------------------------------------------------------- config


def from_arguments(*arguments: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    return parser.instantiate(parser.parse_args([f"--reward{argument}" for argument in arguments])).reward


def test_a_server_reward_from_a_config() -> None:
    reward = from_arguments(
        "=sppo_lightning.rewards.server.ServerReward",
        ".base_url=http://localhost:8000",
        ".format=sppo_lightning.rewards.server.VLLMPooling",
        ".format.model=rm",
        ".timeout=5",
        ".api_key_env=OTHER_KEY",
    )
    assert isinstance(reward, ServerReward)
    assert isinstance(reward.format, VLLMPooling)
    assert reward.format.model == "rm"
    assert (reward._client.timeout, reward._client.api_key_env) == (5, "OTHER_KEY")


def test_a_judge_from_a_config() -> None:
    reward = from_arguments(
        "=sppo_lightning.rewards.pairwise.PairwiseReward",
        ".judge=sppo_lightning.rewards.judge.OpenAIJudge",
        ".judge.base_url=http://localhost:8000/v1",
        ".judge.model=judge",
        ".judge.instructions={prompt} {first} {second}",
        ".judge.max_retries=1",
        ".opponents=3",
    )
    assert isinstance(reward, PairwiseReward)
    assert isinstance(reward.judge, OpenAIJudge)
    assert reward.judge.instructions == "{prompt} {first} {second}"
    assert reward.judge._client.max_retries == 1
    assert reward.opponents == 3
