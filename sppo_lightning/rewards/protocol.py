"""The contract of a reward: prompts and response texts in, one number a response out."""

from __future__ import annotations

import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from typing import Any, ClassVar, NamedTuple, cast

import torch

from sppo_lightning.types import SPEED_OR_PLACE, Prompt, UserError, first_line


class Scores(NamedTuple):
    """Rewards, and the numbers that they are made of."""

    rewards: list[float]  # one a response; a non-finite one drops that response
    reasons: Mapping[int, str] = {}  # row of a dropped response: why, e.g. ``too_long_to_score``
    parts: Mapping[str, Sequence[float]] = {}  # numbers that the rewards are made of, by name, one a response
    error: str | None = None  # what the first failure said, for the error that ends a run of failures


class RewardMemory(NamedTuple):
    """What scoring takes of the policy's device, in bytes."""

    weights: int = 0
    conversation: int = 0  # in addition to the weights, while one conversation is scored
    waiting: int = 0  # of the weights, what stays there between phases


class Reward(ABC):
    """Scores responses; higher is better. Chosen in the config by ``class_path``.

    A subclass needs :meth:`score` only. A non-finite number, or ``None``, drops that response under a named reason.

    ``gives_win_probabilities`` says that pairs get the mean probability that a response beats another, in [0, 1]: the
    part ``win_probability`` of :class:`Scores`, or the rewards themselves if there is no such part.
    """

    gives_win_probabilities: ClassVar[bool] = False
    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE
    """Arguments of the constructor that decide speed or place, never a score: a run that resumes may change them."""

    @property
    def comparative(self) -> bool:
        """Whether a score compares a prompt's responses with each other: all come in one call, side by side."""
        return False

    @property
    def remote(self) -> bool:
        """Whether scoring is done on a server: :meth:`score` then runs in a thread while responses are sampled."""
        return False

    @property
    def gives_difficulty(self) -> bool:
        """Whether a prompt's mean reward says how hard it is; comparisons have the same mean for every prompt."""
        return not self.comparative

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float] | Scores:
        """Return one reward for each (prompt, response); responses to the same prompt are neighbours."""

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the reward cannot work; called before any model loads."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if a prompt lacks what the reward needs."""

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Return what scoring will take of ``device``, before anything loads and perhaps before :meth:`check`.

        Args:
            device: where the reward is going to be loaded.
            tokens: of the longest conversation.
        """
        return RewardMemory()

    def smaller(self) -> Mapping[str, Reward]:
        """Return rewards that take less memory, by the setting that makes them, e.g. ``init_args.quantization=nf4``."""
        return {}

    def load(self, device: torch.device) -> None:
        """Take up what scoring needs."""

    def unload(self) -> None:
        """Leave the device to others."""


class CheckedScores(NamedTuple):
    """Rewards that keep the contract."""

    rewards: list[float]
    reasons: dict[int, str]  # every row whose reward is not finite, and others that the reward dropped
    parts: dict[str, list[float]]
    error: str | None  # what the first failed call said


def checked_scores(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str]) -> CheckedScores:
    """Score responses; one that cannot be scored is dropped alone, and a reward that breaks its contract is refused.

    Where a call raises, its prompts are scored apart, then their responses: those that still raise are dropped as
    ``failed_score``.

    Raises:
        UserError: if the reward raises one, returns the wrong count, or something that is no number.
    """
    try:
        scores = _scored(reward, prompts, responses)
    except UserError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # a library that ends the process would end the run as if it were done
        cut = _middle(prompts, whole_prompts=reward.comparative)
        if cut is None:
            rows = range(len(responses))
            return CheckedScores(
                [math.nan] * len(rows), dict.fromkeys(rows, "failed_score"), {}, _said(reward, error)
            )
        halves = [
            checked_scores(reward, prompts[part], responses[part]) for part in (slice(cut), slice(cut, None))
        ]
        return _joined(halves, cut)
    return _checked(scores, len(responses), _name(reward))


def _scored(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
    """Return what a reward gives, its numbers taken out of whatever they come in."""
    found, name, count = reward.score(prompts, responses), _name(reward), len(responses)
    scores = found if isinstance(found, Scores) else Scores(cast(Any, found))
    for field, value in (("reasons", scores.reasons), ("parts", scores.parts)):
        if not isinstance(value, Mapping):
            raise UserError(f"{name} gave {field} as a {type(value).__name__}: give a mapping")
    parts = {part: _items(values, count, f"{name} part {part!r}") for part, values in scores.parts.items()}
    return scores._replace(rewards=_items(scores.rewards, count, name), parts=parts)


def _items(values: Any, count: int, name: str) -> list[Any]:
    """Return the items of a list, an array or what else has an order, of which there must be ``count``."""
    ordered = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    if not ordered or getattr(values, "ndim", 1) == 0:
        raise UserError(f"{name} returned a {type(values).__name__}: it must return a list of numbers")
    items = list(islice(values, count + 1))  # of a generator, which may have no end
    if len(items) != count:
        found = (
            str(len(values))
            if isinstance(values, Sized)
            else f"{len(items)}{' or more' * (len(items) > count)}"
        )
        raise UserError(f"{name} returned {found} rewards for {count} responses: it must return one for each")
    return items


def _middle(prompts: Sequence[Prompt], *, whole_prompts: bool) -> int | None:
    """Return where to cut a call in two, between two prompts if there are several."""
    starts = [row for row in range(1, len(prompts)) if prompts[row].id != prompts[row - 1].id]
    if not starts and not whole_prompts:
        starts = list(range(1, len(prompts)))
    return starts[len(starts) // 2] if starts else None


def _said(reward: Reward, error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return f"{_name(reward)} raised {type(error).__name__}: {first_line(error)} ({place})"


def _name(reward: Reward) -> str:
    return f"data.reward {type(reward).__name__}"


def _joined(halves: Sequence[CheckedScores], cut: int) -> CheckedScores:
    first, second = halves
    names = {**first.parts, **second.parts}
    return CheckedScores(
        first.rewards + second.rewards,
        first.reasons | {row + cut: reason for row, reason in second.reasons.items()},
        {name: _column(first, name) + _column(second, name) for name in names},
        first.error or second.error,
    )


def _column(scores: CheckedScores, name: str) -> list[float]:
    return scores.parts.get(name, [math.nan] * len(scores.rewards))


def _checked(scores: Scores, count: int, name: str) -> CheckedScores:
    rewards = [_number(value, name) for value in scores.rewards]
    reasons = {row: "non_finite_reward" for row, value in enumerate(rewards) if not math.isfinite(value)}
    for row, reason in scores.reasons.items():
        if row not in range(count) or not isinstance(reason, str) or not reason:
            raise UserError(
                f"{name} gave {reason!r} as the reason to drop response {row!r} of {count}: it must be a text, and the "
                "response one of them, from 0 on"
            )
    parts = {part: [_number(value, name) for value in values] for part, values in scores.parts.items()}
    wrong = next((part for part in parts if not isinstance(part, str)), None)
    if wrong is not None:
        raise UserError(f"{name} called a part {wrong!r}: a name is a text")
    return CheckedScores(rewards, {**reasons, **scores.reasons}, parts, scores.error)


def _number(score: Any, name: str) -> float:
    if score is None:
        return math.nan
    try:
        if not isinstance(score, str):
            return float(score)
    except OverflowError:  # an integer beyond 1e308
        return math.copysign(math.inf, 1 if score > 0 else -1)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} returned {score!r}, which is no number: it must return one number a response")
