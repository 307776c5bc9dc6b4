"""The contract of a reward: prompts and response texts in, one number a response out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from sppo_lightning.types import Prompt, UserError


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
    name = type(reward).__name__
    try:
        scores = list(reward.score(prompts, responses))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.reward {name} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(responses):
        raise UserError(
            f"data.reward {name} returned {len(scores)} rewards for {len(responses)} responses: "
            "it must return one for each"
        )
    try:
        return [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"data.reward {name} returned something that is no number: {error}") from error
