"""The contract of a generation engine: token ids in, sampled token ids out; it never sees a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from sppo_lightning.types import SPEED_OR_PLACE, FinishReason, Ranks, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PolicySource(Protocol):
    """A snapshot of the policy, which an engine samples from until it is unloaded."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end a response."""

    @property
    def embedding_rows(self) -> int:
        """How many token ids it has embeddings for, from 0 on: no other can be trained on."""

    @property
    def quantized(self) -> bool:
        """Whether its base is held in fewer bits than a folder of it would be."""

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        """Make full weights ready to be sampled or exported; all processes call it together, before they begin.

        Args:
            ranks: the processes.
            needed: whether this one will sample or export.
        """

    def sampling_model(self) -> torch.nn.Module:
        """Return the policy, ready to sample from: compute dtype, eval mode, on its device."""

    def resident_model(self) -> torch.nn.Module | None:
        """Return the policy as it lies in this process, in eval mode, for a short forward; no copy is made.

        ``None`` where its weights are sharded, so that no process can run it by itself.
        """

    def fingerprint(self) -> str:
        """Return a digest of the policy."""

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder; an adapter in PEFT's layout."""


class SampleRequest(NamedTuple):
    """One prompt to answer."""

    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]  # one for each response; empty for the greedy answer


class PromptResponses(NamedTuple):
    """The responses to one request."""

    request: int  # position of the request
    responses: list[Response]


class EngineMemory(NamedTuple):
    """What an engine takes of the policy's device while it samples."""

    copies: bool  # whether it takes the policy's sampling model
    rows: int  # responses whose keys and values it holds at once
    reserved: int = 0  # bytes that it takes for itself, whatever is asked of it


class Generator(ABC):
    """Answers prompts with the current policy; chosen in the config by ``class_path``.

    Args:
        max_new_tokens: longest response, in tokens, its end token included.
        temperature: divides the logits; greater than 0. Held-out answers are greedy whatever it is.
        top_p: sample from the smallest set of tokens that holds this probability, in (0, 1].
        top_k: sample from the k most likely tokens; 0 for all.
        stop: texts that end a response as an end token does; they are cut off its text, not off its tokens.
        max_total_tokens: most tokens of prompt and response together; ``None``: no limit of its own.
    """

    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE
    """Arguments of the constructor that decide speed or place, never a response: a run that resumes may change them."""

    on_batch_progress: Callable[[float, int], None] | None = None
    """Told, by engines that can, how much of the batch that is being sampled is done: in prompts, and in tokens."""

    def __init__(
        self,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: list[str] | None = None,
        max_total_tokens: int | None = None,
    ) -> None:
        name = type(self).__name__
        if max_new_tokens < 1:
            raise ValueError(f"{name}.max_new_tokens={max_new_tokens} must be at least 1")
        if not temperature > 0:
            raise ValueError(
                f"{name}.temperature={temperature} must be greater than 0: identical samples make no pair"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"{name}.top_p={top_p} must lie in (0, 1]")
        if top_k < 0:
            raise ValueError(f"{name}.top_k={top_k} must be 0 (all tokens) or more")
        if stop is not None and (not stop or "" in stop):
            raise ValueError(f"{name}.stop={stop} must hold texts that are not empty")
        if max_total_tokens is not None and max_total_tokens < 2:
            raise ValueError(f"{name}.max_total_tokens={max_total_tokens} must be at least 2")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.stop = stop
        self.max_total_tokens = max_total_tokens

    @property
    def streams(self) -> bool:
        """Whether requests are read as the engine comes to them.

        It is then asked for all shards at once, and need not wait for the last response of one shard before it begins
        the next.
        """
        return False

    @property
    def reproducible(self) -> bool:
        """Whether a response depends on its request and seed only, so that a run started again samples the same."""
        return True

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the engine cannot work; called before any model loads."""

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Return what the engine will take of ``device``, before anything loads.

        Args:
            row: bytes of the keys and values of the longest response and its prompt.
            free: bytes that the policy leaves.
            total: bytes that the run may take in all.
            device: the policy's.
        """
        return EngineMemory(copies=True, rows=1)

    def total_limit(self) -> int | None:
        """Return the most tokens of prompt and response together that the engine takes; ``None``: as the policy.

        Called before any model loads. ``max_total_tokens`` is what the config asks for, this is what there is.
        """
        return None

    @abstractmethod
    def load(self, policy: PolicySource) -> None:
        """Take the current policy's weights."""

    @abstractmethod
    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield the responses to each request, in any order.

        A request's seeds decide its responses, whatever else is asked for; a request without seeds gets one
        greedy response.
        """

    @abstractmethod
    def unload(self) -> None:
        """Free what :meth:`load` took."""

    def longest_response(self, prompt_tokens: int) -> int:
        """Return how many tokens a response to a prompt of ``prompt_tokens`` may have."""
        if self.max_total_tokens is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.max_total_tokens - prompt_tokens)

    def as_response(self, token_ids: Sequence[int], policy: PolicySource) -> Response:
        """Return sampled tokens with their text, and whether an end token or a stop string ended them."""
        ended = token_ids[-1] in policy.end_token_ids
        shown = list(token_ids[:-1] if ended else token_ids)
        text = str(policy.tokenizer.decode(shown, skip_special_tokens=True))
        if self.stop is not None:
            whole = str(policy.tokenizer.decode(shown, skip_special_tokens=False))
            ended = ended or any(stop in whole for stop in self.stop)
            cuts = [place for stop in self.stop if (place := text.find(stop)) >= 0]
            text = text[: min(cuts, default=None)]
        finish: FinishReason = "stop" if ended else "length"
        return Response(tuple(token_ids), text, finish)


def malformed_ids(
    token_ids: Sequence[object], *, embedding_rows: int, longest: int | None = None
) -> str | None:
    """Return what is wrong with a response's token ids, or ``None``.

    Args:
        token_ids: as they came, of any type.
        embedding_rows: of the policy.
        longest: tokens that were asked for; ``None``: not known here.
    """
    if longest is not None and len(token_ids) > longest:
        return f"{len(token_ids)} tokens, more than the {longest} that were asked for"
    for token in token_ids:
        if type(token) is not int and (isinstance(token, bool) or not isinstance(token, Integral)):
            return f"{token!r:.40} for a token id"
        if not 0 <= int(token) < embedding_rows:
            return f"token id {token!s:.40}, but the policy has ids from 0 to {embedding_rows - 1} only"
    return None
