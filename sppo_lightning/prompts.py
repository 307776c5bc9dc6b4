"""Read prompts from files or a hub dataset, and turn them into token ids through one templating function."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo_lightning.types import EncodedPrompt, Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Record = tuple[str, Mapping[str, Any]]  # where it stands, for error messages; its fields


def read_prompts(source: str | Sequence[str], *, key: str) -> list[Prompt]:
    """Read prompts from files, globs, folders or hub datasets.

    Args:
        source: one or several of: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a glob of them, a
            folder of them, or the id of a hub dataset (``owner/name`` or ``owner/name:split``).
        key: config key to name in errors, e.g. ``data.prompts``.

    Raises:
        UserError: naming the file and line, if there is nothing to read or a record is no prompt.
    """
    sources = [source] if isinstance(source, str) else list(source)
    prompts: dict[str, Prompt] = {}
    for record in (record for item in sources for record in _records(item, key)):
        prompt = _parse(record)
        twin = prompts.setdefault(prompt.id, prompt)
        if twin != prompt:
            raise UserError(
                f"{record[0]}: id {prompt.id!r} was already used by a prompt with other content: "
                "give each prompt its own id, or leave ids out to have them derived from the content"
            )
    if not prompts:
        raise UserError(f"{key}={source!r} holds no prompts: add at least one record with a 'prompt' field")
    return list(prompts.values())


def check_disjoint(train: Sequence[Prompt], held_out: Sequence[Prompt], *, key: str) -> None:
    """Refuse held-out prompts that are also trained on.

    Raises:
        UserError: naming one overlapping prompt.
    """
    seen = {_content_id(prompt.messages): prompt.id for prompt in train}
    shared = [prompt for prompt in held_out if _content_id(prompt.messages) in seen]
    if shared:
        twin = seen[_content_id(shared[0].messages)]
        raise UserError(
            f"{len(shared)} of {len(held_out)} prompts of {key} are also in data.prompts "
            f"(first: {shared[0].id!r} = training prompt {twin!r}): remove them from one of the two"
        )


def _records(source: str, key: str) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{key}: folder {source} has no {', '.join(SUFFIXES)} file")
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(file) for file in glob.glob(source, recursive=True))
    if files:
        for file in files:
            yield from _file_records(file, key)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith(".") or "*" in source:
        raise UserError(f"{key}={source!r}: no such file; check the path (it is relative to {Path.cwd()})")
    else:
        yield from _hub_records(source, key)


def _file_records(file: Path, key: str) -> Iterator[Record]:
    if file.suffix == ".jsonl":
        yield from _jsonl_records(file)
    elif file.suffix == ".json":
        yield from _json_records(file)
    elif file.suffix in (".csv", ".parquet"):
        import datasets

        try:
            table = datasets.load_dataset(
                file.suffix[1:], data_files=str(file), split="train", keep_in_memory=True
            )
        except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"{file}: cannot be read as {file.suffix[1:]}: {_first_line(cause)}") from error
        for row, fields in enumerate(table, start=1):
            yield f"{file}:row {row}", {k: v for k, v in fields.items() if v is not None}
    else:
        raise UserError(f"{key}: {file} is none of {', '.join(SUFFIXES)}")


def _jsonl_records(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _object(_parse_json(line, f"{file}:{number}"), f"{file}:{number}")


def _json_records(file: Path) -> Iterator[Record]:
    content = file.read_bytes()
    if not content.strip():
        return
    items = _parse_json(content, str(file))
    if not isinstance(items, list):
        raise UserError(f"{file}: expected a JSON list of prompt records; for one record a line use .jsonl")
    for number, item in enumerate(items, start=1):
        yield f"{file}:record {number}", _object(item, f"{file}:record {number}")


def _parse_json(content: bytes, where: str) -> object:
    try:
        value: object = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f" line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}:{place} broken JSON, {error.msg} at column {error.colno}") from error
    return value


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with a 'prompt' field, got {type(value).__name__}")
    return value


def _hub_records(source: str, key: str) -> Iterator[Record]:
    import datasets

    name, _, split = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{key}={source!r} is neither a file here nor a dataset that the hub gave: {_first_line(error)}"
        ) from error
    for row, fields in enumerate(table, start=1):
        yield f"{source}:row {row}", {k: v for k, v in fields.items() if v is not None}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parse(record: Record) -> Prompt:
    where, fields = record
    text, messages = fields.get("prompt"), fields.get("messages")
    if (text is None) == (messages is None):
        found = ", ".join(sorted(fields)) or "none"
        raise UserError(f"{where}: needs either 'prompt' (text) or 'messages' (list); its fields are: {found}")
    turns: tuple[Message, ...]
    if messages is not None:
        turns = _parse_messages(messages, where)
        text = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
    elif isinstance(text, str) and text.strip():
        turns = (Message(role="user", content=text),)
    else:
        raise UserError(f"{where}: 'prompt' must be a text that is not empty, got {text!r}")
    answer = fields.get("answer")
    known = {"id", "prompt", "messages", "answer"}
    return Prompt(
        id=str(fields["id"]) if "id" in fields else _content_id(turns),
        text=text,
        messages=turns,
        answer=None if answer is None else str(answer),
        metadata={name: value for name, value in fields.items() if name not in known},
    )


def _parse_messages(messages: Any, where: str) -> tuple[Message, ...]:
    shape = "'messages' must be a non-empty list of {'role': text, 'content': text}"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {shape}")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(name), str) for name in ("role", "content")
        ):
            raise UserError(f"{where}: {shape}, got {turn!r}")
        turns.append(Message(role=turn["role"], content=turn["content"]))
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's: there is nothing left to answer")
    return tuple(turns)


def _content_id(messages: Sequence[Message]) -> str:
    text = json.dumps([[turn["role"], turn["content"].strip()] for turn in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def template_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Turn a conversation into token ids: the only place where a chat template is applied.

    A tokenizer without a chat template takes a single user message as plain text. At most one BOS opens the
    sequence, whether the template or the tokenizer adds it.

    Raises:
        UserError: if there are several messages and no chat template.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise UserError(
                "the tokenizer has no chat template, so that prompts must be plain text: use 'prompt' instead "
                "of 'messages', or an instruct model"
            )
        return single_bos(tokenizer, tokenizer(messages[0]["content"])["input_ids"])
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
    )
    return single_bos(tokenizer, encoded["input_ids"])


def single_bos(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return ``token_ids`` with a run of opening BOS tokens cut down to one."""
    start = 0
    while len(token_ids) > start + 1 and token_ids[start] == token_ids[start + 1] == tokenizer.bos_token_id:
        start += 1
    return list(token_ids[start:])


class EncodingResult(NamedTuple):
    """The prompts that fit, and the ids of those that do not."""

    kept: list[EncodedPrompt]
    too_long: list[str]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], *, max_tokens: int
) -> EncodingResult:
    """Template and tokenise prompts; those over ``max_tokens`` are dropped whole, never truncated."""
    kept: list[EncodedPrompt] = []
    too_long: list[str] = []
    for prompt in prompts:
        ids = template_token_ids(tokenizer, prompt.messages, add_generation_prompt=True)
        if len(ids) <= max_tokens:
            kept.append(EncodedPrompt(prompt, tuple(ids)))
        else:
            too_long.append(prompt.id)
    return EncodingResult(kept, too_long)
