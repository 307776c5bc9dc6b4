"""What a pairing rule sees, and what it returns. Shapes: N responses of one prompt."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.types import WIN_PROBABILITY, FinishReason, ScoredRollout


class Choice(NamedTuple):
    """Row numbers of the chosen and the rejected response."""

    chosen: int
    rejected: int


@dataclass(frozen=True, eq=False)
class Responses:
    """The usable responses to one prompt in the order of ``sample_index``: two or more, not all with the same reward.

    Args:
        rows: the responses; a text (``.response``) or its tokens (``.token_ids``) is read from its file when asked for.
        rewards: ``[N]`` float64, finite.
    """

    rows: Sequence[ScoredRollout]
    rewards: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, ``[N]`` int64."""
        return torch.tensor([row.length for row in self.rows])

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Why each response ended."""
        return tuple(row.finish_reason for row in self.rows)

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """The number of each response among all that were sampled for the prompt."""
        return tuple(row.sample_index for row in self.rows)

    @property
    def win_probabilities(self) -> Tensor | None:
        """Mean win probability of each response, ``[N]`` float64; ``None`` if the reward gives none."""
        found = torch.tensor([win_probability(row) for row in self.rows], dtype=torch.float64)
        return None if bool(found.isnan().all()) else found


class Pairing(ABC):
    """Chooses the responses to learn from, by ``class_path`` in the config.

    A subclass defines one of two methods: ``choose(rewards, generator)``, which returns one :class:`Choice`, or
    :meth:`pairs`. ``choose`` gets the ``[N]`` finite rewards, not all equal, in the order of ``sample_index``, and the
    prompt's own randomness. ``most_pairs`` is the most pairs that :meth:`pairs` may return for a prompt.
    """

    choose: Callable[[Tensor, torch.Generator], Choice]
    most_pairs: int = 1

    def pairs(self, responses: Responses, generator: torch.Generator) -> Sequence[Choice]:
        """Return the prompt's pairs; none drops the prompt as ``no_pair``.

        Args:
            responses: the prompt's usable responses.
            generator: the prompt's own randomness.
        """
        return [self.choose(responses.rewards, generator)]


def win_probability(row: ScoredRollout) -> float:
    """Return a response's mean win probability; NaN if the reward gives none."""
    return row.reward_parts.get(WIN_PROBABILITY, math.nan)
