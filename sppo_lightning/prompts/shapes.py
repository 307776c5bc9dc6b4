"""The shapes of record that prompts come in, recognised by their fields.

A shape turns a record's fields into a conversation that ends where the policy has to answer, and, where the record has
one, a reference answer. Shapes are tried in the order of :data:`SHAPES`; the first that matches counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

from sppo_lightning.types import Message, UserError

Fields = Mapping[str, Any]
LISTED = 12  # names of fields that a message lists

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What ShareGPT's ``from`` means as a role."""

TEMPLATED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""Fields of a turn besides role and content that change what a chat template makes of it."""


class Conversation(NamedTuple):
    """What a record asks, and what else was taken from it."""

    turns: tuple[Message, ...]  # ends where the policy answers
    answer: Any = None  # reference answer that comes with the shape, e.g. the last turn of a chat
    text: str | None = None  # for people; None: what the user says
    used: frozenset[str] = frozenset()  # fields that are in the turns or the answer
    takes_answer: bool = False  # whether a field called answer was looked at


class Shape(NamedTuple):
    """One shape of record."""

    name: str  # as users know it
    fields: str  # for the message that lists all shapes
    matches: Callable[[Fields], bool]
    read: Callable[[Fields, str], Conversation]  # the fields, and where the record stands


def shape_of(fields: Fields, where: str) -> Shape:
    """Return the first shape that a record has.

    Args:
        fields: of the record, those without a value left out.
        where: the record stands, e.g. ``prompts.jsonl:3``.

    Raises:
        UserError: listing the fields that were found and the shapes that are known.
    """
    for shape in SHAPES:
        if shape.matches(fields):
            return shape
    found = names_of(fields)
    known = "; ".join(f"{shape.fields} ({shape.name})" for shape in SHAPES)
    raise UserError(
        f"{where}: no prompt is recognised; its fields are: {found}. Records that are read: {known}. For other names "
        "set data.columns, e.g. {prompt: question_text, answer: solution}"
    )


def names_of(fields: Iterable[str]) -> str:
    """Return the names of a record's fields, as many as fit a message."""
    names = sorted(fields)
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*(_short_name(name) for name in names[:LISTED]), *more]) or "none"


def _short_name(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}…"


# ------------------------------------------------------------------------- turns


def parse_turns(value: Any, where: str, field: str) -> tuple[Message, ...]:
    """Return a list of turns, ``{role, content}`` or ShareGPT's ``{from, value}``, as messages.

    Args:
        value: the list.
        where: the record stands.
        field: that it was found in.

    Raises:
        UserError: naming the record, if that is no conversation in text.
    """
    shape = f"'{field}' must be a non-empty list of {{'role': text, 'content': text}}"
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {shape}, got {_short(value)}")
    return tuple(_parse_turn(turn, where, shape) for turn in value)


def _parse_turn(turn: Any, where: str, shape: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {shape}, got {_short(turn)}")
    role: Any
    content: Any
    if "role" not in turn and "from" in turn:
        role, content = _sharegpt_role(turn["from"], where), turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    extra = {name: turn[name] for name in TEMPLATED if turn.get(name) not in (None, "", [], {})}
    if content is None and extra.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_text_part(part, where) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: {shape}, got {_short(turn)}")
    return cast(Message, {"role": role, "content": content, **extra})


def _sharegpt_role(name: Any, where: str) -> str:
    if name not in ROLES:
        raise UserError(f"{where}: 'from': {_short(name)} is none of {', '.join(ROLES)}")
    return ROLES[name]


def _text_part(part: Any, where: str) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise UserError(
        f"{where}: a message holds a part of type {kind or _short(part)!r}, but prompts are text only: leave the "
        "record out, or keep its text parts"
    )


def _split_answer(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """Take the assistant's last turn off a conversation: it is the reference answer."""
    if turns and turns[-1]["role"] == "assistant" and len(turns) > 1:
        return turns[:-1], turns[-1]["content"].strip() or None
    return turns, None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _user(text: str, *before: Message) -> tuple[Message, ...]:
    return (*before, Message(role="user", content=text))


def _required_text(fields: Fields, name: str, where: str) -> str:
    text = fields[name]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: '{name}' must be a text that is not empty, got {_short(text)}")
    return text


# ------------------------------------------------------------------------ shapes


def _read_prompt(fields: Fields, where: str) -> Conversation:
    text = _required_text(fields, "prompt", where)
    return Conversation(_user(text), text=text, used=frozenset({"prompt"}))


def _read_conversational_prompt(fields: Fields, where: str) -> Conversation:
    return Conversation(parse_turns(fields["prompt"], where, "prompt"), used=frozenset({"prompt"}))


def _read_messages(fields: Fields, where: str) -> Conversation:
    turns, answer = _split_answer(parse_turns(fields["messages"], where, "messages"))
    return Conversation(turns, answer, used=frozenset({"messages"}))


def _read_implicit_prompt(fields: Fields, where: str) -> Conversation:
    chosen, rejected = (parse_turns(fields[name], where, name) for name in ("chosen", "rejected"))
    pairs = zip(chosen, rejected, strict=False)
    common = [turn for turn, _ in takewhile(lambda both: both[0] == both[1], pairs)]
    turns = _until_user(common)
    if not turns:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' have no common beginning, which would be the prompt"
        )
    return Conversation(turns)


def _until_user(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Leave out what the assistant says at the end of a conversation."""
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    return tuple(turns[:end])


_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _read_transcript(fields: Fields, where: str) -> Conversation:
    pieces = _TURN.split(fields["chosen"])[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        Message(role=roles[speaker], content=text.strip())
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return Conversation(_until_user(turns))


def _read_sharegpt(fields: Fields, where: str) -> Conversation:
    name = "conversations" if "conversations" in fields else "conversation"
    turns, answer = _split_answer(parse_turns(fields[name], where, name))
    used = {name}
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = (Message(role="system", content=system), *turns)
        used.add("system")
    return Conversation(turns, answer, used=frozenset(used))


def _read_alpaca(fields: Fields, where: str) -> Conversation:
    text = _required_text(fields, "instruction", where)
    more = fields.get("input")
    if isinstance(more, str) and more.strip():
        text = f"{text}\n{more}"
    before: list[Message] = []
    used = {"instruction", "input", "output"}
    system = fields.get("system")
    if isinstance(system, str) and system.strip():
        before.append(Message(role="system", content=system))
        used.add("system")
    if isinstance(fields.get("history"), list):
        for said in fields["history"]:
            if not (isinstance(said, list) and len(said) == 2 and all(isinstance(one, str) for one in said)):
                raise UserError(
                    f"{where}: 'history' must be a list of [user, assistant] texts, got {_short(said)}"
                )
            before += [Message(role="user", content=said[0]), Message(role="assistant", content=said[1])]
        used.add("history")
    return Conversation(_user(text, *before), fields.get("output"), text=text, used=frozenset(used))


def _read_first_turn(fields: Fields, where: str) -> Conversation:
    first = next(iter(fields["turns"]), None)
    text = first.get("content") if isinstance(first, dict) else first
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the first of 'turns' must be a text that is not empty, got {_short(text)}")
    reference = fields.get("reference")
    answer = reference[0] if isinstance(reference, list) and reference else None
    return Conversation(
        _user(text), answer, text=text, used=frozenset({"turns"} if len(fields["turns"]) == 1 else ())
    )


def _reader_of(prompt: str, answers: Sequence[str]) -> Callable[[Fields, str], Conversation]:
    """Return a reader of records that have a question in one field and an answer in another."""

    def read(fields: Fields, where: str) -> Conversation:
        text = _required_text(fields, prompt, where)
        used, answer = {prompt}, None
        for name in answers:
            value = fields.get(name)
            if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
                used |= {name} & {"answer"}  # under another name a reward may look for it
                answer = value
                break
        return Conversation(_user(text), answer, text=text, used=frozenset(used), takes_answer=True)

    return read


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: all(name in fields for name in names)


def _has_list(*names: str, of: type = object) -> Callable[[Fields], bool]:
    """Return whether all of these fields are lists, with a first item of a kind, if they have one."""

    def matches(fields: Fields) -> bool:
        values = [fields.get(name) for name in names]
        return all(
            isinstance(value, list) and all(isinstance(item, of) for item in value[:1]) for value in values
        )

    return matches


SHAPES = (
    Shape(
        "conversational prompt", "prompt: [{role, content}]", _has_list("prompt"), _read_conversational_prompt
    ),
    Shape("prompt", "prompt: text", _has("prompt"), _read_prompt),
    Shape("messages", "messages: [{role, content}]", _has("messages"), _read_messages),
    Shape(
        "implicit prompt",
        "chosen and rejected: [{role, content}]",
        _has_list("chosen", "rejected"),
        _read_implicit_prompt,
    ),
    Shape(
        "HH-RLHF",
        "chosen and rejected: text that begins with 'Human:'",
        lambda fields: _is_transcript(fields.get("chosen")) and _is_transcript(fields.get("rejected")),
        _read_transcript,
    ),
    Shape("ShareGPT", "conversations: [{from, value}]", _has_list("conversations"), _read_sharegpt),
    Shape("ShareGPT", "conversation: [{from, value}]", _has_list("conversation"), _read_sharegpt),
    Shape("Arena-Hard", "turns: [{content}]", _has_list("turns", of=dict), _read_first_turn),
    Shape("MT-Bench", "turns: [text]", _has_list("turns", of=str), _read_first_turn),
    Shape("Alpaca", "instruction, input, output", _has("instruction"), _read_alpaca),
    Shape(
        "question",
        "question, answer",
        _has("question"),
        _reader_of("question", ("answer", "response", "solution")),
    ),
    Shape(
        "problem",
        "problem, answer or solution",
        _has("problem"),
        _reader_of("problem", ("answer", "solution")),
    ),
)
