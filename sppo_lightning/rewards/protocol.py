"""The contract of a reward: prompts and response texts in, one number a response out."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sppo_lightning.types import Prompt, UserError, first_line


class Reward(ABC):
    """Scores responses; higher is better. Chosen in the config by ``class_path``.

    A subclass needs :meth:`score` only. A non-finite number drops that response under a named reason.
    """

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one reward for each (prompt, response)."""

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the reward cannot work; called before any model loads."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if a prompt lacks what the reward needs."""

    def load(self, device: torch.device) -> None:
        """Take up what scoring needs."""

    def unload(self) -> None:
        """Free what :meth:`load` took."""


def checked_scores(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Score responses and refuse a reward that breaks its contract.

    Raises:
        UserError: if the reward raises, returns the wrong count, or something that is no number.
    """
    name = f"data.reward {type(reward).__name__}"
    try:
        scores = reward.score(prompts, responses)
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{name} raised {type(error).__name__}: {first_line(error)} ({frame.filename}:{frame.lineno}, in "
            f"{frame.name}): correct it there"
        ) from error
    if not isinstance(scores, Iterable):
        raise UserError(f"{name} returned a {type(scores).__name__}: it must return a list of numbers")
    scores = list(scores)
    if len(scores) != len(responses):
        raise UserError(
            f"{name} returned {len(scores)} rewards for {len(responses)} responses: it must return one for each"
        )
    return [_number(score, name) for score in scores]


def _number(score: Any, name: str) -> float:
    try:
        if not isinstance(score, str):
            return float(score)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} returned {score!r}, which is no number: it must return one number a response")
