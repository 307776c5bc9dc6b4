"""Frozen records that flow through the self-play loop, and the error that users see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import Signals
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar, get_args

T = TypeVar("T")

FinishReason = Literal["stop", "length", "failed"]
"""``stop``: the model sampled an end-of-sequence token or a stop string; ``length``: cut by ``max_new_tokens`` or
``max_total_tokens``; ``failed``: no usable answer came back."""

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

WIN_PROBABILITY = "win_probability"
"""The part of a reward that pairs take up: the mean probability that a response beats another, in [0, 1]."""

Phase = Literal["evaluating", "probing", "generating", "predicting", "scoring", "reference"]
"""What a run is doing between two training phases."""

ResumeMode = Literal["auto", "never", "must"]
"""``auto``: resume what a run folder holds; ``never``: refuse a folder that holds a run; ``must``: refuse one
without a checkpoint."""


SPEED_OR_PLACE = frozenset(
    {"batch_size", "batch_tokens", "between_phases", "gpu_memory_utilization"}
    | {"base_url", "api_key_env", "max_concurrency", "timeout", "max_retries", "startup_timeout"}
)
"""Names of settings that by convention decide how fast or where a component works, never its results."""


class Stopped(BaseException):
    """A signal asked the run to stop, and all progress is on disk; like ``KeyboardInterrupt``, no error to handle.

    Args:
        signal: which one.
    """

    def __init__(self, signal: Signals) -> None:
        super().__init__(f"stopped by {signal.name}")
        self.signal = signal


class UserError(ValueError):
    """Bad input from a user: printed as one line, without a traceback, by the command line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to be quoted in a :class:`UserError`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn of a conversation; what else a chat template may read stands in it where the file has it."""

    tool_calls: Any
    tool_call_id: str
    name: str
    reasoning_content: str
    reasoning: str
    thinking: str


@dataclass(frozen=True)
class Prompt:
    """One prompt as read from a file; ``text`` is for people, ``messages`` is what gets templated."""

    id: str
    text: str
    messages: tuple[Message, ...]
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and the token ids that the policy sees, generation header included."""

    prompt: Prompt
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """One sampled answer; ``token_ids`` holds exactly what was sampled, its end token included."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    drop_reason: str | None = None  # why the response takes no part in anything, e.g. ``server_error``


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt; ``reward`` is ``None`` until scored, and may be non-finite after."""

    prompt_id: str
    sample_index: int
    prompt: str
    response: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    reward: float | None
    reward_parts: Mapping[str, float] = field(
        default_factory=dict
    )  # numbers that the reward is made of, logged apart
    drop_reason: str | None = None  # why the response takes no part in difficulty and pairing

    @property
    def usable(self) -> bool:
        """Whether the response takes part in difficulty and pairing."""
        return self.drop_reason is None and self.reward is not None and math.isfinite(self.reward)

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return len(self.token_ids)


class ScoredRollout(Protocol):
    """What pairing and counting read of a response: a :class:`Rollout`, or one that still lies in its file."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def sample_index(self) -> int: ...
    @property
    def response(self) -> str: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def length(self) -> int: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def reward(self) -> float | None: ...
    @property
    def reward_parts(self) -> Mapping[str, float]: ...
    @property
    def drop_reason(self) -> str | None: ...
    @property
    def usable(self) -> bool: ...


@dataclass(frozen=True)
class PreferencePair:
    """A chosen and a rejected response to one prompt; reference log-probs are sums in nats.

    A mean win probability lies in [0, 1], and is NaN where the reward gives none.
    """

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    reference_chosen_logp: float = float("nan")
    reference_rejected_logp: float = float("nan")
    chosen_win_probability: float = float("nan")
    rejected_win_probability: float = float("nan")
    chosen_sample_index: int = -1  # -1: not known, of a pair that an older version stored
    rejected_sample_index: int = -1
    reference_chosen_token_logps: tuple[float, ...] = ()  # one a token, nats; only for a loss that reads them
    reference_rejected_token_logps: tuple[float, ...] = ()


class PhaseProgress(NamedTuple):
    """Progress inside one phase: prompts (pairs, when ``reference``) and tokens done so far.

    ``under_way`` is the part of the batch that is being sampled, in prompts; 0 between two batches.
    """

    phase: Phase
    iteration: int
    done: int
    total: int
    tokens: int
    under_way: float = 0.0


class Ranks(Protocol):
    """The processes that share a run."""

    rank: int
    world_size: int

    def barrier(self, name: str) -> None:
        """Return once every rank has called it."""

    def gather(self, values: list[Any]) -> list[list[Any]]:
        """Return every rank's values, in rank order, on every rank."""

    def same(self, value: T) -> T:
        """Return rank zero's value on every rank."""

    def check(self) -> None:
        """Return at once, unless another process failed or is gone: then raise a :class:`UserError`."""
