"""A conversation as a record of a prompt file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import Message, UserError

SUFFIX = ".jsonl"


def save_conversation(path: Path, messages: Sequence[Message], *, conversational: bool) -> int:
    """Add a conversation to a prompt file, which ``data.prompts`` reads, and return how many prompts it holds.

    Where the conversation ends with an answer, that is the prompt's reference answer. The file is read back before it
    takes its name.

    Args:
        path: a ``.jsonl`` file, there or not.
        messages: at least one.
        conversational: whether the policy takes messages; else the last text alone is the prompt.

    Raises:
        UserError: if it would not be read, or the file cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UserError(
            f"{path} does not end with {SUFFIX}, by which a prompt file is known: name one that does"
        )
    record = _record(messages, conversational=conversational)
    try:
        before = path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a prompt file ({error}): name another") from error
    opened = before + "\n" if before and not before.endswith("\n") else before
    trial = path.with_name(f".{path.stem}.{os.getpid()}{SUFFIX}")
    try:
        write_atomically(trial, f"{opened}{json.dumps(record, ensure_ascii=False)}\n".encode())
        prompts = read_prompts(str(trial), key=str(path))
        saved = next(prompt for prompt in prompts if prompt.id == record["id"])
        assert list(saved.messages) == _asked(messages, conversational=conversational)
        trial.replace(path)
    except (OSError, UserError) as error:
        raise UserError(
            f"{path}: the conversation cannot be saved there ({error}): name another file"
        ) from error
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)
    return len(prompts)


def _record(messages: Sequence[Message], *, conversational: bool) -> dict[str, Any]:
    asked = _asked(messages, conversational=conversational)
    said: dict[str, Any] = {"messages": list(messages)} if conversational else {"prompt": asked[0]["content"]}
    if not conversational and messages[-1]["role"] == "assistant":
        said["answer"] = messages[-1]["content"]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=4).hexdigest()
    return {"id": f"chat-{digest}", **said}


def _asked(messages: Sequence[Message], *, conversational: bool) -> list[Message]:
    """Return what the policy is to answer."""
    asked = list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    return asked if conversational else asked[-1:]
