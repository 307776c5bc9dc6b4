"""Completions of OpenAI's API: what a server says of a response, and token ids where it says them in text only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Completion(NamedTuple):
    """What a server says about one response; ``None`` where it says nothing."""

    text: str
    finish_reason: str | None
    stopped_by: int | str | None  # token id or stop string: vLLM's stop_reason, SGLang's matched_stop
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    logps: list[float] | None  # of each sampled token, nats


def read_completion(answer: Any) -> Completion:
    """Return the single completion in a server's answer.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: if it holds none, or one whose parts are of another type.
    """
    (choice,) = answer["choices"]
    usage = answer.get("usage") or {}
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    completion = Completion(
        text=choice["text"],
        finish_reason=choice.get("finish_reason"),
        stopped_by=choice.get("stop_reason", choice.get("matched_stop")),
        token_ids=choice.get("token_ids"),
        prompt_token_ids=choice.get("prompt_token_ids"),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        logps=None if logps is None else [float(logp) for logp in logps],
    )
    completion.text.encode()  # a lone surrogate is text for JSON, but for no tokenizer and no file
    for ids in (completion.token_ids, completion.prompt_token_ids):
        if not isinstance(ids, list | None):
            raise TypeError(f"{type(ids).__name__} for token ids")
    return completion


def prompt_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text that the tokenizer turns into exactly ``token_ids``, or ``None`` if there is none.

    The opening BOS is left out of the text where the tokenizer adds it by itself.
    """
    for ids in (token_ids, token_ids[1:]):
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text)["input_ids"] == list(token_ids):
            return text
    return None


def retokenised(
    completion: Completion, tokenizer: PreTrainedTokenizerBase, *, end_token: int | None
) -> list[int] | None:
    """Return a response's token ids from its text and their number, or ``None`` if the two do not agree.

    Args:
        completion: the text, the number of sampled tokens, and how the response ended.
        tokenizer: the policy's.
        end_token: what ended the response, if an end token did and is known.
    """
    ids: list[int] = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
    # a replacement character may stand for any bytes that are no text, as many as its own
    if "\ufffd" in completion.text or tokenizer.decode(ids, skip_special_tokens=True) != completion.text:
        return None
    if completion.finish_reason == "stop":
        if end_token is None:
            return None
        ids = [*ids, end_token]
    return ids if len(ids) == completion.completion_tokens else None
