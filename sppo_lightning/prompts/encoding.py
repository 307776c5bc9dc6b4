"""Prompts to token ids, through one templating function."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from jinja2 import TemplateError

from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.prompts.table import EncodedPrompts, PromptTable
from sppo_lightning.types import Message, Prompt, UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN = "plain"  # said in place of a chat template


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
