"""A judge on a server: how it is asked, and what is made of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from support.judges import completion, labelled, longer, prefers, texts
from support.servers import Answer as Sent
from support.servers import Request, serving

from sppo_lightning.judging import (
    Answer,
    LabelProbabilities,
    ServerJudge,
    Shown,
    Verdict,
    VerdictFormat,
    WrittenVerdict,
)
from sppo_lightning.types import Message, Prompt, UserError

PROMPT = Prompt("p", "Why?", (Message(role="user", content="Why?"),))


def shown(first: str = "Because.", second: str = "No.") -> Shown:
    return Shown(PROMPT, Answer(PROMPT, first), Answer(PROMPT, second))


def judged(
    respond: Callable[[Request], Sent],
    *comparisons: Shown,
    format: VerdictFormat | None = None,
    **options: Any,
) -> tuple[list[Verdict], list[Request]]:
    with serving(respond) as server:
        judge = ServerJudge(server.url, "judge", format, **{"max_retries": 0, **options})
        found = dict(judge.judge(comparisons or [shown()]))
    return [found[position] for position in sorted(found)], server.requests


def test_a_written_verdict() -> None:
    verdicts, requests = judged(
        prefers(longer), shown("long answer", "short"), shown("s", "long"), shown("a", "b")
    )
    assert [verdict.first_wins for verdict in verdicts] == [1.0, 0.0, 0.5]
    assert verdicts[0].said == "I have thought about it.\nA"
    assert (verdicts[0].prompt_tokens, verdicts[0].completion_tokens) == (100, 10)
    body = requests[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 1024)
    assert "logprobs" not in body
    assert "<request>\nWhy?\n</request>" in body["messages"][0]["content"]


def test_label_probabilities() -> None:
    """P(A) = 0.6 and P(B) = 0.2 of all tokens, and so 0.75; a token with a space in front is the same label."""
    logprobs = labelled(math.log(0.6), math.log(0.2), tokens=("A", " B"))
    (verdict,), (request,) = judged(
        lambda request: completion("A", finish_reason="length", logprobs=logprobs),
        format=LabelProbabilities(),
    )
    assert verdict.first_wins == pytest.approx(0.75)
    assert verdict.logprobs == {"A": math.log(0.6), " B": math.log(0.2)}
    assert request.body | {"messages": None} == {
        "model": "judge",
        "messages": None,
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert texts(request) == ("Because.", "No.")


def test_a_label_that_is_not_among_the_likeliest_has_no_probability() -> None:
    logprobs = labelled(-0.1, -5.0, tokens=("m", "The"))
    (verdict,), _ = judged(
        lambda request: completion("m", logprobs=logprobs), format=LabelProbabilities(labels=("m", "M"))
    )
    assert verdict.first_wins == 1.0


WRITTEN, LABELS = WrittenVerdict(max_tokens=7), LabelProbabilities()


@pytest.mark.parametrize(
    ("format", "sent", "reason", "is_final"),
    [
        (WRITTEN, completion("Both are fine."), "unknown_answer", True),
        (WRITTEN, completion(""), "unknown_answer", True),
        (WRITTEN, completion("A or B, or", finish_reason="length"), "cut_answer", True),
        (WRITTEN, completion(None), "unknown_answer", True),
        (
            LABELS,
            completion("Hm", logprobs=labelled(-1.0, -2.0, tokens=("Hm", "Oh"))),
            "unknown_answer",
            True,
        ),
        (LABELS, completion("A"), "no_logprobs", True),
        (LABELS, completion("A", logprobs={"content": [{}]}), "malformed_answer", False),
        (LABELS, completion("A", logprobs=[3]), "malformed_answer", False),
        (WRITTEN, Sent(200, {"answers": []}), "malformed_answer", False),
        (WRITTEN, Sent(500, {"error": "no memory"}), "server_error", False),
    ],
)
def test_an_answer_without_a_verdict_has_a_name(
    format: VerdictFormat, sent: Sent, reason: str, is_final: bool
) -> None:
    (verdict,), _ = judged(lambda request: sent, format=format)
    assert math.isnan(verdict.first_wins)
    assert verdict.reason == reason
    assert verdict.is_final is is_final


def test_cost_by_the_million_tokens() -> None:
    judge = ServerJudge("http://localhost", "judge", prompt_price=2.5, completion_price=10.0)
    assert judge.cost(2_000_000, 100_000) == pytest.approx(6.0)
    assert ServerJudge("http://localhost", "judge").cost(1, 1) is None


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    _, (request,) = judged(prefers(longer), api_key_env="MY_KEY")
    assert request.headers["authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (
            completion("Well."),
            r"'judge' gave no verdict on a trial \(unknown_answer: Well\.\): correct the address",
        ),
        (Sent(200, {}), r"gave no verdict on a trial \(malformed_answer: .*cannot be read"),
        (Sent(404, {"error": "no such model"}), r"knows no such address or model"),
    ],
)
def test_a_trial_before_anything_is_paid_for(sent: Sent, said: str) -> None:
    with serving(lambda request: sent) as server, pytest.raises(UserError, match=said) as refused:
        ServerJudge(server.url, "judge", max_retries=0).check()
    assert "\n" not in str(refused.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "localhost"}, r"must start with http"),
        ({"prompt_price": 1.0}, r"prompt_price and completion_price go together"),
        (
            {"format": WrittenVerdict("Judge {prompt}")},
            r"WrittenVerdict\.instructions lacks \{first\}, \{second\}",
        ),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerJudge(**{"base_url": "http://localhost", "model": "judge", **options})


def test_formats_that_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        WrittenVerdict(max_tokens=0)
    with pytest.raises(ValueError, match="must be at least 2"):
        LabelProbabilities(top_logprobs=1)
    for labels in (("A", "A"), (" A", "B"), ("", "B")):
        with pytest.raises(ValueError, match="two different texts"):
            LabelProbabilities(labels=labels)
