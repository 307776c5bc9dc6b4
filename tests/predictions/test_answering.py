"""Answering the records of a prompt file, turn by turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Digits, Echo, Unsampled, collector
from support.models import byte_tokenizer

from sppo_lightning.generation import SampleRequest
from sppo_lightning.predictions import AlpacaEval, JSONLines, MTBench, PredictionFormat
from sppo_lightning.predictions.answering import check_follow_ups, write_predictions
from sppo_lightning.prompts.encoding import encode_prompts
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Message, Prompt, Response, UserError

TOKENIZER = byte_tokenizer()


class Reader(Unsampled):
    """A policy with a tokenizer."""

    tokenizer = TOKENIZER
    level = 6


class Parrot(Echo):
    """Says the last word of what it was asked."""

    def response(self, prompt: tuple[int, ...], seed: int) -> Response:
        text = str(TOKENIZER.decode(list(prompt), skip_special_tokens=True))
        word = text.removesuffix("<assistant>").split()[-1]
        ids = tuple(TOKENIZER(word, add_special_tokens=False)["input_ids"])
        return Response(ids, word, "stop", "server_error" if word == "fail" else None)


def question(number: int, *turns: str, **metadata: Any) -> Prompt:
    return Prompt(
        f"p{number}",
        turns[0],
        (Message(role="user", content=turns[0]),),
        metadata={"question_id": 80 + number, "turns": list(turns), **metadata},
    )


def predict(
    root: Path, format: PredictionFormat, records: Sequence[Prompt], engine: Echo, *, max_tokens: int = 200
) -> list[Any]:
    encode = partial(encode_prompts, TOKENIZER, max_tokens=max_tokens)
    unique = PromptTable({record.id: record for record in records}.values())
    reward = Digits()
    place, lines = write_predictions(
        RunFolder(root),
        records,
        encode(unique).kept,
        format=format,
        encode=encode,
        collector=collector(engine, reward),
        policy=Reader(),  # type: ignore[arg-type]
    )
    assert reward.events == []
    assert not (root / "predictions-parts").exists()
    written = place.read_text()
    found = (
        json.loads(written)
        if place.suffix == ".json"
        else [json.loads(line) for line in written.splitlines()]
    )
    assert found == [json.loads(line) for line in lines]
    return found


def test_lines_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "predictions-parts").mkdir()
    (tmp_path / "predictions-parts/greedy-00000.parquet").write_text("of another policy")
    records = [question(number, f"text {number}") for number in range(3)]
    assert predict(tmp_path, JSONLines(), records, Echo()) == [
        {
            "id": f"p{number}",
            "prompt": f"text {number}",
            "response": "level 6 seed 0",
            "finish_reason": "length",
        }
        for number in range(3)
    ]


def test_each_record_has_its_row(tmp_path: Path) -> None:
    records = [question(0, "say one"), question(1, "x" * 300), question(0, "say one"), question(2, "say two")]
    with pytest.warns(UserWarning, match=r"1 of 4 records .* \(prompt_too_long: 1\); their texts are empty"):
        found = predict(tmp_path / "mine", AlpacaEval(), records, Parrot())
    assert [row["output"] for row in found] == ["one", "", "one", "two"]
    assert {row["generator"] for row in found} == {"mine"}
    found = predict(tmp_path / "mine", AlpacaEval(model="other"), records[:1], Parrot())
    assert found[0]["generator"] == "other"


def test_the_second_turn_is_asked_after_the_first_answer(tmp_path: Path) -> None:
    engine = Parrot()
    records = [question(0, "say one", "and two"), question(1, "say three", "and four")]
    found = predict(tmp_path, MTBench(), records, engine)
    assert [row["choices"][0]["turns"] for row in found] == [["one", "two"], ["three", "four"]]
    assert [row["question_id"] for row in found] == [80, 81]
    asked = [TOKENIZER.decode(list(request.token_ids)) for request in engine.asked]
    assert asked[2:] == [
        "<bos><user>say one<assistant>one<eos><user>and two<assistant>",
        "<bos><user>say three<assistant>three<eos><user>and four<assistant>",
    ]
    assert engine.asked[0] == SampleRequest(engine.asked[0].token_ids, ()), "answers are greedy"


def test_turns_that_cannot_be_asked(tmp_path: Path) -> None:
    records = [
        question(0, "say fail", "and two"),
        question(1, "say one", "x" * 300),
        question(2, "x" * 300, "and two"),
        question(3, "say one", "and two"),
    ]
    with pytest.warns(
        UserWarning, match=r"3 of 4 records .* \(prompt_too_long: 2, server_error: 1\); their texts are empty"
    ):
        found = predict(tmp_path, MTBench(), records, Parrot())
    assert [row["choices"][0]["turns"] for row in found] == [
        ["fail", ""],
        ["one", ""],
        ["", ""],
        ["one", "two"],
    ]


def test_a_template_that_takes_one_turn_only_is_refused_before_sampling() -> None:
    records = [question(0, "say one", "and two")]
    plain = partial(encode_prompts, byte_tokenizer(chat_template=None), max_tokens=200)
    with pytest.raises(UserError, match="no chat template"):
        check_follow_ups(MTBench(), records, plain)
    check_follow_ups(MTBench(), records, partial(encode_prompts, TOKENIZER, max_tokens=200))
    check_follow_ups(JSONLines(), records, plain)
