"""Prompts to the token ids that the policy is asked with."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo_lightning.prompts.chat_template import POLICY, template_token_ids
from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.prompts.table import EncodedPrompts, PromptTable
from sppo_lightning.types import Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(UserError):
    """A prompt that the tokenizer cannot take.

    Args:
        prompt_id: which one.
        reason: why.
    """

    def __init__(self, prompt_id: str, reason: str) -> None:
        super().__init__(f"prompt {prompt_id!r}: {reason}")
        self.prompt_id = prompt_id
        self.reason = reason


def _accepts(encode: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message]) -> bool:
    try:
        encode(messages)
    except UserError:
        return False
    return True


def tools_of(prompt: Prompt) -> list[Any] | None:
    """Return the functions that a prompt's record offers in its field ``tools``: a list of schemas, or that as JSON."""
    tools = prompt.metadata.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    if not isinstance(tools, list) or not tools:
        return None
    known = all(isinstance(tool, dict) and ("function" in tool or "name" in tool) for tool in tools)
    return tools if known else None


def asked(prompt: Prompt, system_prompt: str | None) -> tuple[Message, ...]:
    """Return the conversation that the policy is asked to go on.

    Args:
        prompt: as its file has it.
        system_prompt: opens the conversations that have no system message of their own.
    """
    if system_prompt is None or prompt.messages[0]["role"] == "system":
        return prompt.messages
    return (Message(role="system", content=system_prompt), *prompt.messages)


_NO_PLACE = (
    f"{POLICY.name} has no place for data.system_prompt: leave it out, or put its text into the prompts"
)


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
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> EncodingResult:
    """Template and tokenise prompts; those over ``max_tokens`` are dropped whole, never truncated.

    Args:
        tokenizer: the policy's.
        prompts: what to encode.
        max_tokens: longest prompt, in tokens, everything that the template adds included.
        system_prompt: opens the conversations that have no system message of their own.
        arguments: further variables of the chat template.

    Raises:
        PromptError: naming the prompt, if the tokenizer cannot take it.
        UserError: if the template has no place for ``system_prompt``, or none for the prompts.
    """
    if system_prompt is not None and tokenizer.chat_template is None:
        raise UserError(
            "data.system_prompt is set, but the policy's tokenizer has no chat template to put it into: leave it "
            "out, or use an instruct model"
        )
    table = prompts if isinstance(prompts, PromptTable) else PromptTable(prompts)
    token_ids = RaggedColumn("i")
    kept = array("q")
    too_long: list[str] = []
    one_for_all, first_ids = False, list[int]()
    heard = system_prompt is None  # whether the template is known to say it
    for row, prompt in enumerate(table):
        messages = asked(prompt, system_prompt)
        encode = partial(
            template_token_ids,
            tokenizer,
            add_generation_prompt=True,
            tools=tools_of(prompt),
            arguments=arguments,
        )
        try:
            ids = encode(messages)
        except UserError as error:
            if messages is not prompt.messages and _accepts(encode, prompt.messages):
                raise UserError(_NO_PLACE) from error
            raise PromptError(prompt.id, str(error)) from error
        if not heard and messages is not prompt.messages:
            heard = True
            if ids == encode(asked(prompt, f"{system_prompt} And so on.")):
                raise UserError(_NO_PLACE)
        one_for_all = row == 0 or (one_for_all and ids == first_ids)
        first_ids = ids if row == 0 else first_ids
        fits = len(ids) <= max_tokens
        token_ids.append(ids if fits else ())
        if fits:
            kept.append(row)
        else:
            too_long.append(prompt.id)
    if one_for_all and any(prompt.messages != table[0].messages for prompt in table):
        raise UserError(f"{POLICY.name} makes the same of all prompts, whatever they say: {POLICY.remedy}")
    return EncodingResult(EncodedPrompts(table, token_ids, kept), too_long)
