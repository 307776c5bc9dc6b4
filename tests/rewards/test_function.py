"""Rewards that are plain functions: this project's signature, and that of TRL's GRPOTrainer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sppo_lightning.rewards import FunctionReward
from sppo_lightning.types import Message, Prompt

SYSTEM = Message(role="system", content="Be brief.")
PROMPTS = [
    Prompt("a", "2 + 2", (Message(role="user", content="2 + 2"),), "4", {"solution": "four", "level": 1}),
    Prompt("b", "3 + 3", (SYSTEM, Message(role="user", content="3 + 3")), None, {"solution": "six"}),
]
RESPONSES = ["It is four.", "It is 6."]


def test_a_function_of_three_arguments() -> None:
    def reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        assert prompts == ["2 + 2", "3 + 3"]
        assert [record.get("answer") for record in metadata] == ["4", None]
        assert metadata[1]["messages"] == list(PROMPTS[1].messages)
        return [float(record["solution"] in text) for text, record in zip(responses, metadata, strict=True)]

    assert FunctionReward(reward).score(PROMPTS, RESPONSES) == [1.0, 0.0]


def test_a_function_of_trl_gets_columns_by_keyword() -> None:
    def reward(completions: list[str], solution: list[str], **kwargs: Any) -> list[float | None]:
        assert kwargs["prompts"] == ["2 + 2", "3 + 3"]
        assert kwargs["level"] == [1, None]
        assert kwargs["answer"] == ["4", None]
        assert kwargs["id"] == ["a", "b"]
        return [1.0 if word in text else None for text, word in zip(completions, solution, strict=True)]

    found = FunctionReward(reward).score(PROMPTS, RESPONSES)
    assert found[0] == 1.0
    assert math.isnan(found[1])


def test_a_function_of_trl_gets_what_it_has_parameters_for() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    assert FunctionReward(reward).score(PROMPTS, RESPONSES) == [11.0, 8.0]


def test_a_function_of_trl_for_conversations() -> None:
    def reward(prompts: list[list[Message]], completions: list[list[Message]], **kwargs: Any) -> list[float]:
        assert prompts[1] == [SYSTEM, Message(role="user", content="3 + 3")]
        assert completions[0] == [Message(role="assistant", content="It is four.")]
        return [float(len(said[0]["content"])) for said in completions]

    assert FunctionReward(reward, conversational=True).score(PROMPTS, RESPONSES) == [11.0, 8.0]


def test_what_cannot_be_given_is_refused_at_the_start() -> None:
    def by_tokens(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        raise AssertionError

    def plain(prompts: list[str], responses: list[str], metadata: list[Any]) -> list[float]:
        raise AssertionError

    with pytest.raises(
        ValueError, match=r"FunctionReward\.function needs 'completion_ids', which only TRL's trainer"
    ):
        FunctionReward(by_tokens)
    with pytest.raises(
        ValueError, match=r"FunctionReward\.conversational is for a function that has a parameter"
    ):
        FunctionReward(plain, conversational=True)
