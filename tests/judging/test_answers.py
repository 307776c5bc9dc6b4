"""Answers of runs and files, and which belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.judges import write_answers, write_run

from sppo_lightning.evaluation.gate import Decision, write_decisions
from sppo_lightning.judging import AnswerSet
from sppo_lightning.judging.answers import matched, read_answers
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError


def read(path: Path, iteration: Any = "last") -> AnswerSet:
    return read_answers(str(path), iteration=iteration, key="--against")


def said(answers: AnswerSet) -> list[tuple[str, str]]:
    return [(answer.prompt.text, answer.text) for answer in answers.answers]


# --------------------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine", [["a", "b"], ["aa", "bc"], ["abc", "b"]])


@pytest.mark.parametrize(
    ("iteration", "name", "texts"),
    [
        ("initial", "mine (initial policy)", ["a", "b"]),
        (0, "mine (after 1 iteration)", ["aa", "bc"]),
        ("last", "mine (after 2 iterations)", ["abc", "b"]),
        ("best", "mine (after 2 iterations)", ["abc", "b"]),
    ],
)
def test_held_out_answers_of_an_iteration(run: Path, iteration: Any, name: str, texts: list[str]) -> None:
    found = read(run, iteration)
    assert found.name == name
    assert said(found) == [("Question 0?", texts[0]), ("Question 1?", texts[1])]
    assert [answer.reward for answer in found.answers] == [float(len(set(text))) for text in texts]
    assert found.settings["seed_everything"] == 1


def test_the_last_policy_may_be_one_that_the_run_reverted_to(run: Path) -> None:
    decision = Decision(2, "revert", ("worse",), 1, -1.0, 0.1, 1.0, "f")
    write_decisions(RunFolder(run), [decision])
    assert read(run).name == "mine (after 1 iteration)"


def test_an_answer_that_failed_has_no_reward(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "mine", [["a", "b"]], rewards=[[None, math.nan]]))
    assert all(math.isnan(answer.reward or 0.0) for answer in found.answers)


def test_folders_that_are_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml; give a folder that was a fit's"):
        read(tmp_path)
    with pytest.raises(
        UserError, match=r"no held-out answers of iteration 7, only of initial, 0, 1: name one of"
    ):
        read(run, 7)
    (tmp_path / "config.yaml").write_text("data: {}\n")
    with pytest.raises(UserError, match=r"has no held-out answers: run fit with data\.eval_prompts"):
        read(tmp_path)
    (tmp_path / "config.yaml").write_text("- [")
    with pytest.raises(UserError, match="cannot be read as a run's config"):
        read(tmp_path)


# -------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"instruction": "Why?", "output": "So.", "generator": "gpt"}, "gpt"),
        ({"id": 3, "prompt": "Why?", "response": "So.", "finish_reason": "stop"}, "answers"),
        ({"question": "Why?", "answer": "So."}, "answers"),
        (
            {
                "uid": "u",
                "model": "mine",
                "messages": [
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": {"answer": "So."}},
                ],
            },
            "mine",
        ),
        (
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
            "answers",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_of_answers(record: dict[str, Any], name: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"answers{suffix}"
    file.write_text(json.dumps([record] if suffix == ".json" else record))
    found = read(file)
    assert said(found) == [("Why?", "So.")]
    assert found.name == name
    assert found.run is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?"},
        {"output": "So."},
        {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]},
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "user", "content": "So?"}]},
        {"messages": ["Why?", "So."]},
    ],
)
def test_records_that_are_no_answers(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"answers\.jsonl:1: no answer is recognised; its fields are: "):
        read(file)


@pytest.mark.parametrize(
    "half", [{"prompt": "Why \ud83d?", "output": "So."}, {"prompt": "Why?", "output": "\ud83d"}]
)
def test_half_a_surrogate_pair(half: dict[str, str], tmp_path: Path) -> None:
    """No server takes it, and no file."""
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(half))
    with pytest.raises(
        UserError, match=r"answers\.jsonl:1: half of a surrogate pair at character \d+, which"
    ):
        read(file)


def test_files_without_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder or file"):
        read(tmp_path / "none.json")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no answers"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="is a file, which has no iterations"):
        read(write_answers(tmp_path / "a.json", ["So."]), 3)


# ----------------------------------------------------------------------- matching


def test_answers_to_the_same_prompt_belong_together(tmp_path: Path) -> None:
    """In the order of those that are compared with; a prompt that one set lacks has no partner."""
    ours = write_answers(tmp_path / "ours.json", ["a", "b", "c"])
    rows = [{"prompt": f"Question {number}?", "response": str(number)} for number in (2, 0, 9)]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(other.text, own.text if own else None) for other, own in matched(read(ours), read(theirs))]
    assert found == [("2", "c"), ("0", "a"), ("9", None)]


def test_one_text_with_several_answers_is_told_apart_by_ids(tmp_path: Path) -> None:
    for name, texts in {"ours": ["a", "b"], "theirs": ["A", "B"]}.items():
        rows = [{"id": number, "prompt": "Why?", "response": text} for number, text in enumerate(texts)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:: 1 if name == "ours" else -1]))
    found = matched(read(tmp_path / "ours.json"), read(tmp_path / "theirs.json"))
    assert [(other.text, own.text) for other, own in found if own] == [("B", "b"), ("A", "a")]


def test_sets_that_have_nothing_in_common(tmp_path: Path) -> None:
    ours = write_answers(tmp_path / "ours.json", ["a"])
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps([{"prompt": "Another?", "response": "b"}]))
    with pytest.raises(
        UserError, match=r"no prompt of .*theirs\.json is in .*ours\.json.*: prompts are matched by"
    ):
        list(matched(read(ours), read(theirs)))
    theirs.write_text(json.dumps([{"prompt": "Question 0?", "response": text} for text in "bc"]))
    with pytest.raises(UserError, match=r"two different answers to the prompt 'Question 0\?': leave one out"):
        list(matched(read(ours), read(theirs)))
    theirs.write_text(json.dumps([{"prompt": "Question 0?", "response": "b"}] * 2))
    assert len(list(matched(read(ours), read(theirs)))) == 2, "AlpacaEval's file may ask a question twice"
