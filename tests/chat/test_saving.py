"""Conversations as prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sppo_lightning.chat.saving import save_conversation
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.types import Message, UserError

TALK = [
    Message(role="user", content="Why?\nReally \u2028 \x1b[31m"),
    Message(role="assistant", content="Because."),
    Message(role="user", content="And “now”?"),
    Message(role="assistant", content="Now too."),
]


def test_prompts_read_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    assert save_conversation(path, TALK, conversational=True) == 1
    assert save_conversation(path, TALK[:2], conversational=True) == 2
    assert save_conversation(path, TALK[:1], conversational=False) == 3
    assert save_conversation(path, TALK, conversational=True) == 3, "it is there already"
    first, second, third = read_prompts(str(path), key="data.prompts")
    assert list(first.messages) == TALK[:3]
    assert first.answer == "Now too."
    assert list(second.messages) == list(third.messages) == TALK[:1]
    assert (second.answer, third.answer) == ("Because.", None)
    assert len({first.id, second.id, third.id}) == 3
    assert [each.name for each in tmp_path.iterdir()] == ["talk.jsonl"]


def test_plain_text_is_saved_with_its_answer(tmp_path: Path) -> None:
    save_conversation(tmp_path / "plain.jsonl", TALK, conversational=False)
    (prompt,) = read_prompts(str(tmp_path / "plain.jsonl"), key="data.prompts")
    assert (prompt.text, prompt.answer) == ("And “now”?", "Now too.")


def test_a_file_of_the_users_keeps_its_records(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Mine"}')  # without a line break behind it
    assert save_conversation(path, TALK, conversational=True) == 2
    assert path.read_text().startswith('{"prompt": "Mine"}\n{"id": "chat-')


def test_a_file_that_cannot_be_read_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("# no prompts\n")
    with pytest.raises(
        UserError, match=r"mine\.jsonl: the conversation cannot be saved there \(.*name another"
    ):
        save_conversation(path, TALK, conversational=True)
    assert path.read_text() == "# no prompts\n"
    assert [each.name for each in tmp_path.iterdir()] == ["mine.jsonl"]
    with pytest.raises(
        UserError, match=r"notes\.txt does not end with \.jsonl, by which a prompt file is known"
    ):
        save_conversation(tmp_path / "notes.txt", TALK, conversational=True)
    with pytest.raises(UserError, match=r"cannot be saved there"):
        save_conversation(path / "below.jsonl", TALK, conversational=True)


def test_an_id_says_which_conversation_it_is(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    save_conversation(path, TALK, conversational=True)
    other = [*TALK[:3], Message(role="assistant", content="No.")]
    assert save_conversation(path, other, conversational=True) == 2
    ids = [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]]
    assert len(set(ids)) == 2
