"""Prompts and their token ids, packed end to end: a row costs its characters and tokens, not Python objects.

A row becomes a record again when it is asked for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.types import EncodedPrompt, Message, Prompt


class PromptTable(Sequence[Prompt]):
    """Prompts by row number.

    A prompt that JSON would change, such as one with a date in its metadata, is held as it is.

    Args:
        prompts: taken one by one.
    """

    def __init__(self, prompts: Iterable[Prompt] = ()) -> None:
        self._ids = RaggedColumn("B")
        self._rest = RaggedColumn("B")
        self._held: dict[int, Prompt] = {}  # by row, those that cannot be packed
        for prompt in prompts:
            self.append(prompt)

    def append(self, prompt: Prompt) -> None:
        """Add a row."""
        packed = _packed(prompt)
        if packed is None:
            self._held[len(self)] = prompt
        self._rest.append(packed or b"")
        self._ids.append(_to_bytes(prompt.id))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, row: int) -> Prompt: ...
    @overload
    def __getitem__(self, row: slice) -> PromptTable: ...
    def __getitem__(self, row: int | slice) -> Prompt | PromptTable:
        if isinstance(row, slice):
            return PromptTable(self[number] for number in range(*row.indices(len(self))))
        row = range(len(self))[row]
        if row in self._held:
            return self._held[row]
        return _unpacked(self.id_of(row), self._rest[row])

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(len(self)))

    def id_of(self, row: int) -> str:
        """Return the id of the prompt in ``row``, which counts from 0."""
        return _to_text(self._ids[row])

    @property
    def ids(self) -> list[str]:
        """All ids, in the order of the rows."""
        return [self.id_of(row) for row in range(len(self))]


def user_text(messages: Sequence[Message]) -> str:
    """Return what the user says in a conversation."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def _packed(prompt: Prompt) -> bytes | None:
    """Return everything but the id, each text once; ``None`` where JSON would not give the same prompt back."""
    messages = list(prompt.messages)
    plain = messages == [{"role": "user", "content": prompt.text}]
    fields = [
        None if not plain and prompt.text == user_text(messages) else prompt.text,
        None if plain else messages,
        prompt.answer,
        prompt.metadata,
    ]
    try:
        return _to_bytes(json.dumps(fields, ensure_ascii=False)) if _is_json(fields) else None
    except (ValueError, RecursionError):  # an endless number, nesting too deep
        return None


def _unpacked(prompt_id: str, packed: array[int]) -> Prompt:
    text, messages, answer, metadata = json.loads(_to_text(packed))
    turns = [Message(role="user", content=text)] if messages is None else messages
    return Prompt(prompt_id, user_text(turns) if text is None else text, tuple(turns), answer, metadata)


def _is_json(value: Any) -> bool:
    """Whether a value is of JSON's own types all through; a subclass or a tuple would come back as another type."""
    if type(value) is dict:
        return all(type(name) is str for name in value) and all(map(_is_json, value.values()))
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in (str, int, float, bool)


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # an answer or metadata may hold half of a surrogate pair


def _to_text(packed: array[int]) -> str:
    return packed.tobytes().decode("utf-8", "surrogatepass")


class EncodedPrompts(Sequence[EncodedPrompt]):
    """Prompts with their token ids, by row number; a slice shares the columns.

    Args:
        prompts: a table that holds them.
        token_ids: of each row of that table.
        rows: rows of the table that this sequence consists of.
    """

    def __init__(self, prompts: PromptTable, token_ids: RaggedColumn, rows: Sequence[int]) -> None:
        self._prompts = prompts
        self._token_ids = token_ids
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> EncodedPrompt: ...
    @overload
    def __getitem__(self, row: slice) -> EncodedPrompts: ...
    def __getitem__(self, row: int | slice) -> EncodedPrompt | EncodedPrompts:
        if isinstance(row, slice):
            return EncodedPrompts(self._prompts, self._token_ids, self._rows[row])
        place = self._rows[row]
        return EncodedPrompt(self._prompts[place], tuple(self._token_ids[place]))

    @property
    def ids(self) -> list[str]:
        """The prompts' ids."""
        return [self._prompts.id_of(place) for place in self._rows]

    def taken(self, rows: Iterable[int]) -> EncodedPrompts:
        """Return some of the prompts, by their row numbers here."""
        return EncodedPrompts(self._prompts, self._token_ids, array("q", (self._rows[row] for row in rows)))

    def by_id(self) -> EncodedById:
        """Return the prompts by id."""
        return EncodedById(self)


class EncodedById(Mapping[str, EncodedPrompt]):
    """Encoded prompts by id, in their order.

    Args:
        prompts: with different ids.
    """

    def __init__(self, prompts: EncodedPrompts) -> None:
        self._prompts = prompts
        self._rows = {prompt_id: row for row, prompt_id in enumerate(prompts.ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, prompt_id: str) -> EncodedPrompt:
        return self._prompts[self._rows[prompt_id]]

    def taken(self, prompt_ids: Iterable[str]) -> EncodedPrompts:
        """Return some of the prompts, by their ids."""
        return self._prompts.taken(self._rows[prompt_id] for prompt_id in prompt_ids)
