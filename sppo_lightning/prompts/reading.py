"""Read prompts from files or a hub dataset, and turn them into token ids through one templating function."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.prompts.files import Record, records
from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.prompts.table import EncodedPrompts, PromptTable, user_text
from sppo_lightning.types import Message, Prompt, UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"  # said in place of a chat template


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


def template_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Turn a conversation into token ids: the only place where a chat template is applied.

    A tokenizer without a chat template takes a single user message as plain text. At most one BOS opens the
    sequence, whether the template or the tokenizer adds it, and the tokenizer appends no EOS.

    Raises:
        UserError: if there are several messages and no chat template, or the template refuses them.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise UserError(
                "the tokenizer has no chat template, so that prompts must be plain text: use 'prompt' instead "
                "of 'messages', or an instruct model"
            )
        return _plain_token_ids(tokenizer, messages[0]["content"])
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": message["role"], "content": message["content"]} for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the model's chat template refuses the roles {roles} ({first_line(error)}): change the messages"
        ) from error
    return single_bos(tokenizer, cast("Mapping[str, list[int]]", encoded)["input_ids"])


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None, *, key: str) -> None:
    """Give a tokenizer the template that the config asks for.

    Args:
        tokenizer: changed in place.
        template: a Jinja file; ``plain``: none, prompts are plain text; ``None``: the tokenizer's own.
        key: of the config.

    Raises:
        UserError: naming ``key``, if the file cannot be read, or if there is no template at all.
    """
    if template == PLAIN:
        tokenizer.chat_template = None
    elif template is not None:
        try:
            tokenizer.chat_template = Path(template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{key}={template!r} cannot be read ({first_line(error)}): name a Jinja file, or {PLAIN}"
            ) from error
    elif tokenizer.chat_template is None:
        raise UserError(
            f"the policy's tokenizer has no chat template: name a Jinja file with {key}, or set {key}={PLAIN} to send "
            "prompts as plain text"
        )


def _plain_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = single_bos(tokenizer, tokenizer(text)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id]:  # the tokenizer's own, unless the text ends with it
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if bare[-1:] == ids[-1:] else ids[:-1]
    return ids


def single_bos(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return ``token_ids`` with a run of opening BOS tokens cut down to one."""
    start = 0
    while len(token_ids) > start + 1 and token_ids[start] == token_ids[start + 1] == tokenizer.bos_token_id:
        start += 1
    return list(token_ids[start:])


class EncodingResult(NamedTuple):
    """The prompts that fit, and the ids of those that do not."""

    kept: EncodedPrompts
    too_long: list[str]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    system_prompt: str | None = None,
) -> EncodingResult:
    """Template and tokenise prompts; those over ``max_tokens`` are dropped whole, never truncated.

    Args:
        tokenizer: the policy's.
        prompts: what to encode.
        max_tokens: longest prompt, in tokens, everything that the template adds included.
        system_prompt: opens the conversations that have no system message of their own.

    Raises:
        UserError: naming the prompt, if the tokenizer cannot take it.
    """
    if system_prompt is not None and tokenizer.chat_template is None:
        raise UserError(
            "data.system_prompt is set, but the policy's tokenizer has no chat template to put it into: leave it "
            "out, or use an instruct model"
        )
    opening = () if system_prompt is None else (Message(role="system", content=system_prompt),)
    table = prompts if isinstance(prompts, PromptTable) else PromptTable(prompts)
    token_ids = RaggedColumn("i")
    kept = array("q")
    too_long: list[str] = []
    for row, prompt in enumerate(table):
        own = prompt.messages[0]["role"] == "system"
        messages = prompt.messages if own else (*opening, *prompt.messages)
        try:
            ids = template_token_ids(tokenizer, messages, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"prompt {prompt.id!r}: {error}") from error
        fits = len(ids) <= max_tokens
        token_ids.append(ids if fits else ())
        if fits:
            kept.append(row)
        else:
            too_long.append(prompt.id)
    return EncodingResult(EncodedPrompts(table, token_ids, kept), too_long)
