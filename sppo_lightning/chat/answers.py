"""Answers, a token at a time: sampled, turned into text that only grows, and read again by another policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sppo_lightning.chat.policies import ChatPolicy
from sppo_lightning.generation.cache import reserved_cache
from sppo_lightning.generation.sampling import sample_tokens
from sppo_lightning.generation.steps import read
from sppo_lightning.pair_forward.logprobs import token_logps
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass
class Sampling:
    """How answers are sampled.

    Args:
        temperature: divides the logits; 0: the most likely token each time.
        top_p: sample from the smallest set of tokens that holds this probability, in (0, 1].
        top_k: sample from the k most likely tokens; 0 for all.
        max_tokens: of an answer, its end token included.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@torch.inference_mode()
def sampled_tokens(
    policy: ChatPolicy, prompt: Sequence[int], sampling: Sampling, *, seed: int
) -> Iterator[int]:
    """Yield the tokens of an answer, its end token included.

    Args:
        policy: that answers.
        prompt: token ids.
        sampling: how.
        seed: decides the answer; two policies that have the same one draw the same random numbers.

    Raises:
        UserError: if the prompt leaves no room for an answer.
    """
    longest = sampling.max_tokens
    if policy.window is not None:
        longest = min(longest, policy.window - len(prompt))
    if longest < 1:
        raise UserError(
            f"the conversation has {len(prompt)} tokens, and {policy.name} has positions for {policy.window} only: "
            "/reset begins a new one"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=policy.device)
    positions = torch.arange(len(prompt), device=policy.device)[None]
    cache = reserved_cache(unwrapped(policy.held.model).config)
    for read_before in range(len(prompt), len(prompt) + longest):
        mask = torch.ones(1, read_before, dtype=torch.long, device=policy.device)
        with policy.active() as model:
            logits = read(model, tokens, mask, positions, cache)  # [1, V]
        token = _pick(logits, sampling, torch.rand(1, generator=generator, dtype=torch.float64))
        yield token
        if token in policy.end_token_ids:
            return
        tokens = torch.tensor([[token]], device=policy.device)
        positions = torch.tensor([[read_before]], device=policy.device)


def _pick(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax(-1))
    return int(
        sample_tokens(
            logits,
            uniforms.to(logits.device),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
    )


class Answer:
    """An answer while it grows.

    Args:
        policy: whose it is.
    """

    def __init__(self, policy: ChatPolicy) -> None:
        self.policy = policy
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False  # by the user

    def add(self, token: int) -> str:
        """Take a token up, and return the text that is new; characters that are not whole yet wait."""
        self.token_ids.append(token)
        return self._grow(self._decoded().rstrip(UNFINISHED))

    def end(self) -> str:
        """Return the text that waited."""
        return self._grow(self._decoded())

    @property
    def finished(self) -> bool:
        """Whether the policy ended it."""
        return bool(self.token_ids) and self.token_ids[-1] in self.policy.end_token_ids

    def _decoded(self) -> str:
        shown = self.token_ids[: -1 if self.finished else None]
        return decoded(self.policy.tokenizer, shown)

    def _grow(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of tokens, without special ones; what is said of the first of them stays as more follow."""
    return str(
        tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


@torch.no_grad()
def answer_logps(policy: ChatPolicy, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the log-prob of each token of an answer, ``[T]`` nats, before any temperature.

    Args:
        policy: that reads it.
        prompt: token ids.
        answer: T token ids.
    """
    ids = torch.tensor([[*prompt, *answer]], device=policy.device)
    with policy.active() as model:
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return token_logps(logits, ids[0, len(prompt) :]).cpu()
