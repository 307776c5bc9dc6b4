"""Conversations to token ids, through a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jinja2 import TemplateError

from sppo_lightning.limits import OutOfTimeError, bounded
from sppo_lightning.types import Message, UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN = "plain"  # said in place of a chat template
LONGEST_SECONDS = 30.0  # that a template may take for a conversation; they take milliseconds
LONGEST_TEXT = 2**26  # characters of a templated conversation
REASONING = ("reasoning_content", "thinking", "reasoning")  # three names of one field
DIRECTIVES = "aAbBcdeFDhHIjmMpSTRuUVwWxXyYCG"  # of strftime

_clock: date | None = None


def set_template_clock(day: date | None) -> None:
    """Let chat templates that print the date print this one from now on, in all of this process.

    Otherwise a run that goes on after midnight would ask other prompts than it began with.

    Args:
        day: ``None``: today.
    """
    global _clock
    _clock = day


def at_day(template: str, day: date) -> str:
    """Return a chat template whose ``strftime_now`` prints one day, at midnight.

    transformers takes no function as a template's variable, so that the day is written into the template, as a macro of
    that name; the line break after it is one that Jinja leaves out.

    Args:
        template: Jinja.
        day: to print.
    """
    midnight = datetime.combine(day, time())
    written = {f"%{flag}{letter}" for flag in ("", "-") for letter in DIRECTIVES}
    filters = "".join(f"|replace({code!r}, {midnight.strftime(code)!r})" for code in sorted(written))
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None) -> str:
    """Return the template that a conversation gets, with the clock that was set."""
    template: str = tokenizer.get_chat_template(None, list(tools) if tools else None)
    return at_day(template, _clock) if _clock is not None and "strftime_now" in template else template


class TemplateOwner(NamedTuple):
    """Whose chat template one is, in the words of an error, and what to do about it."""

    name: str
    remedy: str


def template_owner(key: str, pretrained: str) -> TemplateOwner:
    """Return the owner of a template that no setting replaces: that of a reward model.

    Args:
        key: of the config, that names the model.
        pretrained: its folder or hub id.
    """
    return TemplateOwner(f"the chat template of {key}={pretrained!r}", "correct it in a copy of that folder")


POLICY = TemplateOwner("the model's chat template", "name another one with model.policy.chat_template")


def template_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    owner: TemplateOwner = POLICY,
) -> list[int]:
    """Turn a conversation into token ids: the only place where a chat template is applied.

    A tokenizer without a chat template takes a single user message as plain text. At most one BOS opens the
    sequence, whether the template or the tokenizer adds it, and the tokenizer appends no EOS.

    Args:
        tokenizer: with the template.
        messages: the conversation.
        add_generation_prompt: whether the opening of the assistant's turn follows.
        tools: JSON schemas of functions, for the template.
        arguments: further variables of the template, e.g. ``enable_thinking``.
        owner: whose template it is, for errors.

    Raises:
        UserError: if there is more than one plain message and no chat template, if the template refuses the messages,
            if it takes no notice of something that they hold, or if it fails.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1 or messages[0]["role"] != "user" or len(messages[0]) > 2:
            raise UserError(
                "the tokenizer has no chat template, so that prompts must be plain text: use 'prompt' instead "
                "of 'messages', or an instruct model"
            )
        return _plain_token_ids(tokenizer, messages[0]["content"])
    _check_is_used(tokenizer, messages, tools, owner)
    try:
        with bounded(LONGEST_SECONDS):
            rendered = tokenizer.apply_chat_template(
                cast(Any, [_by_all_names(message) for message in messages]),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                chat_template=_template(tokenizer, tools),
                **arguments,
            )
    except TemplateError as error:
        if type(error) is not TemplateError:  # else it comes from raise_exception in the template
            raise _broken_template(error, owner) from error
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{owner.name} refuses the roles {roles} ({first_line(error)}): change the messages"
        ) from error
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        OutOfTimeError,
    ) as error:
        raise _broken_template(error, owner) from error
    text = cast(str, rendered)
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{owner.name} makes {len(text):,} characters of one conversation: {owner.remedy}")
    # as apply_chat_template does, out of the bounds: tokenizers may not be interrupted
    ids = single_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"{owner.name} makes not a single token of a conversation: {owner.remedy}")
    return ids


def _by_all_names(message: Message) -> dict[str, Any]:
    """Return a message with its reasoning under each of its names: transformers fills in two of them, once not any."""
    fields: dict[str, Any] = {**message}
    said = next((fields[name] for name in REASONING if fields.get(name) is not None), None)
    return fields if said is None else {**dict.fromkeys(REASONING, said), **fields}


def _broken_template(error: Exception, owner: TemplateOwner) -> UserError:
    return UserError(f"{owner.name} fails ({type(error).__name__}: {first_line(error)}): {owner.remedy}")


def _check_is_used(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    owner: TemplateOwner,
) -> None:
    """Refuse what the template would drop without a word, so that the model would be asked something else."""
    held = {
        name for message in messages for name in message if name not in ("role", "content", "tool_call_id")
    }
    held -= {"name"} if all(message["role"] == "tool" for message in messages if "name" in message) else set()
    held |= {"tools"} if tools else set()
    if not held:
        return
    template = _template(tokenizer, tools)
    for name in sorted(held):
        if not any(known in template for known in (REASONING if name in REASONING else (name,))):
            raise UserError(
                f"{owner.name} takes no notice of {name!r}, so that the model would be asked something "
                "else: leave these records out, remove the field, or use a model whose template knows it"
            )


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


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that a chat template puts after what the assistant says; ``None`` if there is none.

    Args:
        tokenizer: with the template.
    """
    if tokenizer.chat_template is None:
        return None
    said = (Message(role="user", content="Is it?"), Message(role="assistant", content="Yes"))
    try:
        token_ids = template_token_ids(tokenizer, said, add_generation_prompt=False)
    except UserError:
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = None
    for token_id in reversed(token_ids):
        if token_id in special:
            end = token_id
        elif str(tokenizer.decode([token_id])).strip():
            break
    return end


def single_bos(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return ``token_ids`` with a run of opening BOS tokens cut down to one."""
    start = 0
    while len(token_ids) > start + 1 and token_ids[start] == token_ids[start + 1] == tokenizer.bos_token_id:
        start += 1
    return list(token_ids[start:])
