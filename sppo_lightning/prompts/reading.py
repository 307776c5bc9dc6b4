"""Read prompts from files or data sets, in whatever shape people have them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sppo_lightning.prompts.files import files_of, records
from sppo_lightning.prompts.formats import Record
from sppo_lightning.prompts.shapes import names_of, shape_of
from sppo_lightning.prompts.table import PromptTable, user_text
from sppo_lightning.types import Message, Prompt, UserError

LOGGER = logging.getLogger(__name__)
COLUMNS = ("prompt", "answer", "id")
"""What ``data.columns`` can name."""

LISTED = 8  # files that are named


def read_prompts(
    source: str | Sequence[str], *, key: str, columns: Mapping[str, str] = MappingProxyType({})
) -> PromptTable:
    """Read prompts from files, globs, folders, saved data sets or data sets of the hub.

    A record's shape is recognised by its fields (:data:`~.shapes.SHAPES`) and said. Records without an id that repeat
    a prompt count once; the first one's reference answer stays.

    Args:
        source: one or several of: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, also compressed, or
            ``.parquet``, ``.arrow``), a glob of them, a folder of them or what ``save_to_disk`` wrote (``folder`` or
            ``folder:split``), or a data set of the hub (``owner/name``, ``owner/name:split`` or
            ``owner/name:config:split``).
        key: config key to name in errors, e.g. ``data.prompts``.
        columns: the source's own names of ``prompt``, ``answer`` and ``id``, where they have others.

    Raises:
        UserError: naming the file and line, if there is nothing to read or a record is no prompt.
    """
    sources = [source] if isinstance(source, str) else list(source)
    table = PromptTable()
    rows: dict[str, int] = {}  # by id
    shapes: Counter[str] = Counter()
    repeated = 0
    for record in _all_records(sources, key, columns):
        prompt, shape, own_answer = _parse(record)
        shapes[shape] += 1
        row = rows.setdefault(prompt.id, len(table))
        if row == len(table):
            table.append(prompt)
            continue
        repeated += 1
        twin = table[row]
        same = twin.messages == prompt.messages and (twin.answer == prompt.answer or not own_answer)
        if not same or (not _is_missing(record[1].get("id")) and twin != prompt):
            raise UserError(_clash(record, locate(source, prompt.id, key=key, columns=columns)))
    if not table:
        raise UserError(f"{key}={source!r} holds no prompts: add at least one record with a 'prompt' field")
    _say_what_was_read(key, sources, shapes, len(table), repeated)
    return table


def read_every_record(
    source: str | Sequence[str], *, key: str, columns: Mapping[str, str] = MappingProxyType({})
) -> list[Prompt]:
    """Return the prompt of each record, in order; :func:`read_prompts` takes one that is repeated once only.

    Args:
        source: as for :func:`read_prompts`.
        key: as for :func:`read_prompts`.
        columns: as for :func:`read_prompts`.

    Raises:
        UserError: naming the file and line, if a record is no prompt.
    """
    sources = [source] if isinstance(source, str) else list(source)
    return [_parse(record)[0] for record in _all_records(sources, key, columns)]


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names of columns that stand for nothing.

    Raises:
        UserError: naming the key.
    """
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"data.columns.{name}: only {', '.join(COLUMNS)} can be named")


def locate(source: str | Sequence[str], prompt_id: str, *, key: str, columns: Mapping[str, str]) -> str:
    """Return where the first record of a prompt stands, e.g. ``prompts.jsonl:3``.

    Args:
        source: as for :func:`read_prompts`.
        prompt_id: of the prompt.
        key: as for :func:`read_prompts`.
        columns: as for :func:`read_prompts`.
    """
    sources = [source] if isinstance(source, str) else list(source)
    for record in _all_records(sources, key, columns):
        if _parse(record)[0].id == prompt_id:
            return record[0]
    return key  # the file has changed since


def _say_what_was_read(
    key: str, sources: Sequence[str], shapes: Mapping[str, int], prompts: int, repeated: int
) -> None:
    if set(shapes) != {"prompt"}:
        named = (
            ", ".join(shapes)
            if len(shapes) == 1
            else ", ".join(f"{name} ({n})" for name, n in shapes.items())
        )
        LOGGER.info(f"{key}: {prompts} prompts, read as {named}")
    if repeated:
        LOGGER.info(f"{key}: {repeated} records repeat another prompt and count once")
    for source in sources:
        read, left_out = files_of(source, key=key)
        if len(read) > 1 or left_out:
            rest = f"; left out: {_names(left_out)}" if left_out else ""
            LOGGER.info(f"{key}: read from {source}: {_names(read)}{rest}")


def _names(files: Sequence[Path]) -> str:
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return ", ".join(file.name for file in files[:LISTED]) + more


def _all_records(sources: Sequence[str], key: str, columns: Mapping[str, str]) -> Iterator[Record]:
    for source in sources:
        for where, fields in records(source, key=key):
            yield where, _renamed(fields, columns, where) if columns else fields


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """Return a record's fields under the names that shapes know."""
    for name, column in columns.items():
        if column not in fields and name == "prompt":
            found = names_of(fields)
            raise UserError(f"{where}: data.columns.{name}={column!r} is not there; its fields are: {found}")
    others = {
        name: value for name, value in fields.items() if name not in columns and name not in columns.values()
    }
    return {**others, **{name: fields.get(column) for name, column in columns.items()}}


def _clash(record: Record, first: str) -> str:
    where, fields = record
    if _is_missing(fields.get("id")):
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
    kept_apart = {digest_of_turns(prompt) for prompt in held_out}
    seen = {spoken: prompt.id for prompt in train if (spoken := digest_of_turns(prompt)) in kept_apart}
    shared = [prompt for prompt in held_out if digest_of_turns(prompt) in seen] if seen else []
    if shared:
        raise UserError(
            f"{len(shared)} of {len(held_out)} prompts of {key} are also in data.prompts (first: "
            f"{shared[0].id!r} = training prompt {seen[digest_of_turns(shared[0])]!r}): remove them on one side"
        )


def digest_of_turns(prompt: Prompt) -> bytes:
    """Return a digest of what is said, without the white space around it, which makes no other prompt."""
    turns = [[turn["role"], turn["content"].strip(), *_more(turn)] for turn in prompt.messages]
    return hashlib.blake2b(json.dumps(turns, default=str).encode(), digest_size=16).digest()


def _parse(record: Record) -> tuple[Prompt, str, bool]:
    """Return a record's prompt, the name of its shape, and whether the record names its answer itself."""
    where = record[0]
    fields = {name: value for name, value in record[1].items() if not _is_missing(value)}
    shape = shape_of(fields, where)
    said = shape.read(fields, where)
    _check_turns(said.turns, where)
    own_answer = "answer" in fields and not said.takes_answer
    answer = _parse_scalar("answer", fields["answer"], where) if own_answer else _as_text(said.answer)
    used = {"id", *said.used, *(["answer"] if own_answer else [])}
    prompt = Prompt(
        id=_parse_scalar("id", fields["id"], where) if "id" in fields else _content_id(said.turns),
        text=user_text(said.turns) if said.text is None else said.text,
        messages=said.turns,
        answer=answer,
        metadata={name: value for name, value in fields.items() if name not in used},
    )
    return prompt, shape.name, "answer" in fields


def _is_missing(value: object) -> bool:
    """Whether a cell is empty: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_turns(turns: Sequence[Message], where: str) -> None:
    """Refuse a conversation that leaves the policy nothing to answer, or that is no text."""
    if turns[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the last message is the assistant's, with nothing left to answer before it: end with the user's"
        )
    if not turns[-1]["content"].strip():
        raise UserError(f"{where}: the last message is empty: there is nothing to answer")
    for turn in turns:
        check_encodable(turn["content"], where)
        check_encodable(turn["role"], f"{where}: a role")
        for more in _more(turn):
            check_encodable(
                json.dumps(more, ensure_ascii=False, default=str), f"{where}: what comes with a message"
            )


def _as_text(answer: object) -> str | None:
    """Return a reference answer as text; ``None`` if it is none, such as a list of choices."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        return None
    return str(answer)


def _parse_scalar(name: str, value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: '{name}' must be a text that is not empty, or a number, got {value!r}")
    text = str(value)
    if name == "id":
        check_encodable(text, f"{where}: 'id'")
    return text


def check_encodable(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which no file and no server takes.

    Args:
        text: of a user's file.
        where: its place, for the error.

    Raises:
        UserError: naming ``where``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair at character {error.start + 1}, which is no text: remove it"
        ) from error


def _content_id(messages: Sequence[Message]) -> str:
    said = [[turn["role"], turn["content"], *_more(turn)] for turn in messages]
    text = json.dumps(said, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _more(turn: Message) -> list[dict[str, Any]]:
    more = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return [more] if more else []
