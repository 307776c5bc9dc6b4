"""Every shape of record that prompts come in, as it stands in people's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.prompts import reading
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.prompts.shapes import SHAPES
from sppo_lightning.types import Message, Prompt, UserError


def turns(*said: str) -> tuple[Message, ...]:
    """Turns of user and assistant, or of another role where the text begins with it: ``system: Be brief.``"""
    found = []
    for number, text in enumerate(said):
        role, _, content = text.partition(": ")
        known = role in ("system", "user", "assistant", "tool")
        default = ("user", "assistant")[number % 2]
        found.append(Message(role=role if known else default, content=content if known else text))
    return tuple(found)


def chat(*said: str) -> list[dict[str, str]]:
    return [dict(turn) for turn in turns(*said)]  # type: ignore[misc]


def sharegpt(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": name, "value": text} for name, text in said]


def read_one(record: dict[str, Any], folder: Path, **settings: Any) -> Prompt:
    path = folder / "p.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = read_prompts(str(path), key="data.prompts", **settings)
    return found


RIVER = "Name a river"
RECORDS: dict[str, tuple[str, dict[str, Any], tuple[Message, ...], str | None]] = {
    "plain": ("prompt", {"prompt": RIVER, "answer": "Rhine"}, turns(RIVER), "Rhine"),
    "TRL prompt": ("conversational prompt", {"prompt": chat(RIVER)}, turns(RIVER), None),
    "TRL prompt, completion": (
        "conversational prompt",
        {"prompt": chat("system: Be brief.", "user: " + RIVER), "completion": chat("assistant: Rhine")},
        turns("system: Be brief.", "user: " + RIVER),
        None,
    ),
    "TRL preference": (
        "conversational prompt",
        {"prompt": chat(RIVER), "chosen": chat("assistant: Rhine"), "rejected": chat("assistant: Bonn")},
        turns(RIVER),
        None,
    ),
    "TRL implicit prompt": (
        "implicit prompt",
        {"chosen": chat("Hi", "Hello", RIVER, "Rhine"), "rejected": chat("Hi", "Hello", RIVER, "Bonn")},
        turns("Hi", "Hello", RIVER),
        None,
    ),
    "the same answer twice": (
        "implicit prompt",
        {"chosen": chat(RIVER, "Rhine"), "rejected": chat(RIVER, "Rhine")},
        turns(RIVER),
        None,
    ),
    "UltraFeedback": (
        "prompt",
        {"prompt": RIVER, "prompt_id": "x", "chosen": chat(RIVER, "Rhine"), "rejected": chat(RIVER, "Bonn")},
        turns(RIVER),
        None,
    ),
    "HH-RLHF": (
        "HH-RLHF",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a river\n\nAssistant: Rhine",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a river\n\nAssistant: Bonn",
        },
        turns("Hi", "Hello", RIVER),
        None,
    ),
    "ShareGPT": (
        "ShareGPT",
        {"conversations": sharegpt(("human", RIVER), ("gpt", "Rhine"))},
        turns(RIVER),
        "Rhine",
    ),
    "ShareGPT, system apart": (
        "ShareGPT",
        {"system": "Be brief.", "conversations": sharegpt(("human", "Hi"), ("gpt", "Ho"), ("human", RIVER))},
        turns("system: Be brief.", "user: Hi", "assistant: Ho", "user: " + RIVER),
        None,
    ),
    "ShareGPT, system first": (
        "ShareGPT",
        {"conversations": sharegpt(("system", "Be brief."), ("user", RIVER), ("chatgpt", "Rhine"))},
        turns("system: Be brief.", "user: " + RIVER),
        "Rhine",
    ),
    "LMSYS": (
        "ShareGPT",
        {"conversation": chat(RIVER, "Rhine"), "language": "English"},
        turns(RIVER),
        "Rhine",
    ),
    "Alpaca": (
        "Alpaca",
        {"instruction": RIVER, "input": "", "output": "Rhine"},
        turns(RIVER),
        "Rhine",
    ),
    "Alpaca with input": (
        "Alpaca",
        {"instruction": "Name one of these", "input": "Rhine, Bonn", "output": "Rhine"},
        turns("Name one of these\nRhine, Bonn"),
        "Rhine",
    ),
    "Alpaca with history": (
        "Alpaca",
        {"instruction": RIVER, "system": "Be brief.", "history": [["Hi", "Hello"]], "output": ""},
        turns("system: Be brief.", "user: Hi", "assistant: Hello", "user: " + RIVER),
        None,
    ),
    "AlpacaEval": (
        "Alpaca",
        {"dataset": "koala", "instruction": RIVER, "output": "Rhine", "generator": "gpt4"},
        turns(RIVER),
        "Rhine",
    ),
    "Arena-Hard v0.1": (
        "Arena-Hard",
        {"question_id": "q1", "category": "a", "cluster": "b", "turns": [{"content": RIVER}]},
        turns(RIVER),
        None,
    ),
    "Arena-Hard v2": (
        "prompt",
        {"uid": "q1", "category": "a", "subcategory": "b", "prompt": RIVER},
        turns(RIVER),
        None,
    ),
    "MT-Bench": (
        "MT-Bench",
        {"question_id": 81, "category": "a", "turns": [RIVER, "Another"], "reference": ["Rhine", "Main"]},
        turns(RIVER),
        "Rhine",
    ),
    "GSM8K": ("question", {"question": RIVER, "answer": "It is. #### 5"}, turns(RIVER), "It is. #### 5"),
    "choices": ("question", {"question": RIVER, "choices": ["a", "b"], "answer": 1}, turns(RIVER), "1"),
    "several answers": ("question", {"question": RIVER, "answer": ["a", "b"]}, turns(RIVER), None),
    "MATH": ("problem", {"problem": RIVER, "level": "1", "solution": "5"}, turns(RIVER), "5"),
    "messages": ("messages", {"messages": chat(RIVER)}, turns(RIVER), None),
    "messages that end with the assistant": (
        "messages",
        {"messages": chat("Hi", "Hello", RIVER, "Rhine")},
        turns("Hi", "Hello", RIVER),
        "Rhine",
    ),
    "messages, and an answer of their own": (
        "messages",
        {"messages": chat(RIVER, "The Rhine."), "answer": "Rhine"},
        turns(RIVER),
        "Rhine",
    ),
    "text parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name"}, {"text": "a river"}]}]},
        turns("Name\na river"),
        None,
    ),
    "text parts of a table, whose other columns are empty": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": RIVER, "image_url": None}]}]},
        turns(RIVER),
        None,
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_and_the_shape_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading.LOGGER, "info", said.append)
    shape, record, expected, answer = RECORDS[name]
    found = read_one(record, tmp_path)
    assert (found.messages, found.answer) == (expected, answer)
    assert said == ([] if shape == "prompt" else [f"data.prompts: 1 prompts, read as {shape}"])


def test_every_shape_has_a_record_here() -> None:
    assert {shape.name for shape in SHAPES} == {shape for shape, *_ in RECORDS.values()}


def test_what_is_not_in_the_conversation_is_kept(tmp_path: Path) -> None:
    _, record, *_ = RECORDS["MT-Bench"]
    kept = {"question_id": 81, "category": "a", "turns": [RIVER, "Another"], "reference": ["Rhine", "Main"]}
    assert read_one(record, tmp_path).metadata == kept
    _, record, *_ = RECORDS["several answers"]
    assert read_one(record, tmp_path).metadata == {"answer": ["a", "b"]}
    _, record, *_ = RECORDS["AlpacaEval"]
    assert read_one(record, tmp_path).metadata == {"dataset": "koala", "generator": "gpt4"}


def test_the_same_prompt_has_the_same_id_in_every_shape(tmp_path: Path) -> None:
    """So that a held-out set in another shape is found among the training prompts."""
    asked = [name for name, (_, _, said, _) in RECORDS.items() if said == turns(RIVER)]
    assert len(asked) > 12
    assert len({read_one(RECORDS[name][1], tmp_path).id for name in asked}) == 1


def test_columns_name_what_nothing_recognises(tmp_path: Path) -> None:
    record = {"query": RIVER, "gold": "Rhine", "nr": 7, "prompt": "not this one", "topic": "geography"}
    columns = {"prompt": "query", "answer": "gold", "id": "nr"}
    found = read_one(record, tmp_path, columns=columns)
    assert (found.id, found.messages, found.answer) == ("7", turns(RIVER), "Rhine")
    assert found.metadata == {"topic": "geography"}
    found = read_one({"talk": chat(RIVER)}, tmp_path, columns={"prompt": "talk"})
    assert found.messages == turns(RIVER)
    with pytest.raises(
        UserError, match=r"p\.jsonl:1: data\.columns\.prompt='query' is not there; its fields are: q"
    ):
        read_one({"q": RIVER}, tmp_path, columns=columns)


def test_a_repeated_chat_with_another_answer_counts_once(tmp_path: Path) -> None:
    """Chat sets hold several answers to one question; only an 'answer' of its own is worth an error."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(RIVER, said)}) + "\n" for said in ("Rhine", "Main")))
    (found,) = read_prompts(str(path), key="data.prompts")
    assert found.answer == "Rhine"


@pytest.mark.parametrize(
    ("record", "wording"),
    [
        (
            {"text": "a", "n": 1},
            r"p\.jsonl:1: no prompt is recognised; its fields are: n, text\. Records that are",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"p\.jsonl:1: a message holds a part of type 'image_url', but prompts are text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
            r"a part of type 'image', but prompts are text only",
        ),
        ({"conversations": sharegpt(("robot", "a"))}, r"'from': 'robot' is none of human, user, gpt"),
        ({"conversations": []}, r"'conversations' must be a non-empty list"),
        ({"turns": [{"content": " "}]}, r"the first of 'turns' must be a text that is not empty, got ' '"),
        ({"turns": [{"text": "a"}]}, r"the first of 'turns' must be a text that is not empty, got None"),
        ({"turns": [""]}, r"the first of 'turns' must be a text that is not empty, got ''"),
        ({"turns": []}, r"no prompt is recognised; its fields are: turns|the first of 'turns'"),
        ({"instruction": ""}, r"'instruction' must be a text that is not empty"),
        (
            {"instruction": "a", "history": ["b"]},
            r"'history' must be a list of \[user, assistant\] texts, got 'b'",
        ),
        ({"question": None}, r"no prompt is recognised; its fields are: none"),
        (
            {"chosen": chat("a", "b"), "rejected": chat("c", "d")},
            r"'chosen' and 'rejected' have no common beginning, which would be the prompt",
        ),
        ({"chosen": "a b", "rejected": "a c"}, r"no prompt is recognised"),
        ({"prompt": chat("a", "b")}, r"the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": 3}]}, r"'messages' must be a non-empty list of"),
    ],
)
def test_a_record_that_is_no_prompt_is_named(record: dict[str, Any], wording: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=wording):
        read_one(record, tmp_path)
