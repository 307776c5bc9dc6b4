"""The contract of a generation engine: token ids in, sampled token ids out; it never sees a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from sppo_lightning.types import Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PolicySource(Protocol):
    """Where an engine gets the current policy from."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end a response."""

    def sampling_model(self) -> torch.nn.Module:
        """Return the current policy, ready to sample from: compute dtype, eval mode, on its device."""


class SampleRequest(NamedTuple):
    """One prompt to answer."""

    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]  # one for each response wanted; empty for the greedy answer


class PromptResponses(NamedTuple):
    """The responses to one request."""

    request: int  # position of the request
    responses: list[Response]


class Generator(ABC):
    """Answers prompts with the current policy; chosen in the config by ``class_path``."""

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
