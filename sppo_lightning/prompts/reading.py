"""Read prompts from files or a hub dataset, and turn them into token ids through one templating function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.prompts.files import Record, records
from sppo_lightning.prompts.table import PromptTable, user_text
from sppo_lightning.types import Message, Prompt, UserError


def read_prompts(source: str | Sequence[str], *, key: str) -> PromptTable:
    """Read prompts from files, globs, folders or hub datasets.

    A record with both ``prompt`` and ``messages`` (as preference sets have) is its ``prompt``; the messages are
    kept as metadata. Records without an id that repeat a prompt count once.

    Args:
        source: one or several of: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a glob of them, a
            folder of them, or the id of a hub dataset (``owner/name`` or ``owner/name:split``).
        key: config key to name in errors, e.g. ``data.prompts``.

    Raises:
        UserError: naming the file and line, if there is nothing to read or a record is no prompt.
    """
    sources = [source] if isinstance(source, str) else list(source)
    table = PromptTable()
    rows: dict[str, int] = {}  # by id
    repeated = 0
    for record in _all_records(sources, key):
        prompt = _parse(record)
        row = rows.setdefault(prompt.id, len(table))
        if row == len(table):
            table.append(prompt)
            continue
        repeated += 1
        twin = table[row]
        same = (twin.messages, twin.answer) == (prompt.messages, prompt.answer)
        if not same or (record[1].get("id") is not None and twin != prompt):
            first = next(item for item in _all_records(sources, key) if _parse(item).id == prompt.id)
            raise UserError(_clash(record, first[0]))
    if not table:
        raise UserError(f"{key}={source!r} holds no prompts: add at least one record with a 'prompt' field")
    if repeated:
        rank_zero_info(f"{key}: {repeated} records repeat another prompt and count once")
    return table


def _all_records(sources: Sequence[str], key: str) -> Iterator[Record]:
    return (record for source in sources for record in records(source, key=key))


def _clash(record: Record, first: str) -> str:
    where, fields = record
    if fields.get("id") is None:
        return (
            f"{where}: the same prompt stands at {first} with another answer: remove one, "
            "or give each its own 'id'"
        )
    return (
        f"{where}: id {str(fields['id'])!r} was already used at {first} by a prompt with other content: give "
        "each prompt its own id, or leave ids out to have them derived from the content"
    )


def check_disjoint(train: Iterable[Prompt], held_out: Sequence[Prompt], *, key: str) -> None:
    """Refuse held-out prompts that are also trained on; of the training prompts one is held at a time.

    Raises:
        UserError: naming one overlapping prompt.
    """
    kept_apart = {_spoken(prompt) for prompt in held_out}
    seen = {spoken: prompt.id for prompt in train if (spoken := _spoken(prompt)) in kept_apart}
    shared = [prompt for prompt in held_out if _spoken(prompt) in seen] if seen else []
    if shared:
        raise UserError(
            f"{len(shared)} of {len(held_out)} prompts of {key} are also in data.prompts (first: "
            f"{shared[0].id!r} = training prompt {seen[_spoken(shared[0])]!r}): remove them on one side"
        )


def _spoken(prompt: Prompt) -> bytes:
    """Return a digest of what is said, without the white space around it, which makes no other prompt."""
    turns = [[turn["role"], turn["content"].strip()] for turn in prompt.messages]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


def _parse(record: Record) -> Prompt:
    where = record[0]
    fields = {name: value for name, value in record[1].items() if value is not None}
    if "prompt" not in fields and "messages" not in fields:
        found = ", ".join(sorted(fields)) or "none"
        raise UserError(f"{where}: needs a 'prompt' (text) or 'messages' (list); its fields are: {found}")
    if "prompt" not in fields:
        turns = _parse_messages(fields["messages"], where)
        text = user_text(turns)
    else:
        text = fields["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where}: 'prompt' must be a text that is not empty, got {text!r}; a list of turns goes "
                "into 'messages'"
            )
        turns = (Message(role="user", content=text),)
    used = {"id", "answer", "prompt" if "prompt" in fields else "messages"}
    for turn in turns:
        _check_encodable(turn["content"], where)
    return Prompt(
        id=_parse_scalar("id", fields["id"], where) if "id" in fields else _content_id(turns),
        text=text,
        messages=turns,
        answer=_parse_scalar("answer", fields["answer"], where) if "answer" in fields else None,
        metadata={name: value for name, value in fields.items() if name not in used},
    )


def _parse_scalar(name: str, value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: '{name}' must be a text that is not empty, or a number, got {value!r}")
    return str(value)


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair at character {error.start + 1}, which is no text: remove it"
        ) from error


def _parse_messages(messages: Any, where: str) -> tuple[Message, ...]:
    shape = "'messages' must be a non-empty list of {'role': text, 'content': text}"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {shape}, got {messages!r}")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(name), str) for name in ("role", "content")
        ):
            raise UserError(f"{where}: {shape}, got {turn!r}")
        turns.append(Message(role=turn["role"], content=turn["content"]))
    if turns[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the last message is the assistant's, so that nothing is left to answer: end with the "
            "user's"
        )
    if not turns[-1]["content"].strip():
        raise UserError(f"{where}: the last message is empty: there is nothing to answer")
    return tuple(turns)


def _content_id(messages: Sequence[Message]) -> str:
    text = json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
