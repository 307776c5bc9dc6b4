"""Pairing rules. Shapes: N responses of one prompt, N ≥ 2, rewards not all equal; μ and σ are their rewards' mean and
population standard deviation. Ties go to the lowest ``sample_index``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sppo_lightning.pairing.contract import Choice, Pairing, Responses


def _lower(rewards: Tensor) -> Tensor:
    """Return the rows of the responses below the best, ``[≤ N - 1]``."""
    return (rewards < rewards.max()).nonzero().flatten()


class BestWorst(Pairing):
    """Highest against lowest reward, as in the paper; ties go to the lowest ``sample_index``."""

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax, argmin)."""
        return Choice(int(rewards.argmax()), int(rewards.argmin()))


class BestRandom(Pairing):
    """Highest reward against a random response with a lower one (Online-RLHF's max/random, arXiv 2405.07863)."""

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax, a random row below the maximum)."""
        lower = _lower(rewards)
        pick = int(torch.randint(len(lower), (1,), generator=generator))
        return Choice(int(rewards.argmax()), int(lower[pick]))


class BestNearest(Pairing):
    """Highest reward against the response with the reward nearest to μ − kσ (arXiv 2502.16825, with k = 2).

    Args:
        k: standard deviations below the mean; 0 is the mean itself.
    """

    def __init__(self, k: float = 2.0) -> None:
        if not math.isfinite(k):
            raise ValueError(f"BestNearest.k={k} must be finite")
        self.k = k

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax, the row below the maximum with the least ``|r - (μ - kσ)|``)."""
        target = rewards.mean() - self.k * rewards.std(correction=0)
        lower = _lower(rewards)
        nearest = (rewards[lower] - target).abs().argmin()
        return Choice(int(rewards.argmax()), int(lower[nearest]))


class BestMinimumOf(Pairing):
    """Highest reward of all responses against the lowest of the first m.

    More responses then raise the chosen reward and leave the rejected one where it was: best against worst declines as
    responses are added (arXiv 2502.16825). A prompt whose first m responses are all tied with the best is dropped.

    Args:
        m: usable responses, by ``sample_index``, that the rejected one comes from; from ``samples_per_prompt`` on the
            rule is :class:`BestWorst`.
    """

    def __init__(self, m: int) -> None:
        if m < 1:
            raise ValueError(f"BestMinimumOf.m={m} must be at least 1")
        self.m = m

    def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
        """Return (argmax of all, argmin of the first m)."""
        return Choice(int(rewards.argmax()), int(rewards[: self.m].argmin()))


class LengthPenalizedBestWorst(Pairing):
    """Highest against lowest ``r - λ|y|``, |y| the response's tokens (the length penalty of arXiv 2405.07863).

    The chosen response may have the lower reward: what training sees as its reward stays without the penalty.

    Args:
        per_token: λ, in reward units a token.
    """

    def __init__(self, per_token: float) -> None:
        if not 0 < per_token < math.inf:
            raise ValueError(f"LengthPenalizedBestWorst.per_token={per_token} must be positive and finite")
        self.per_token = per_token

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        """Return (argmax, argmin) of the penalised rewards; none if they are all equal."""
        penalised = responses.rewards - self.per_token * responses.lengths
        best, worst = int(penalised.argmax()), int(penalised.argmin())
        return [Choice(best, worst)] if penalised[best] > penalised[worst] else []


class MarginThreshold(Pairing):
    """Those pairs of another rule whose reward gap, chosen less rejected, lies within limits.

    Args:
        pairing: the other rule.
        min_gap: least gap, in reward units.
        max_gap: largest gap, in reward units; ``None``: no limit.
    """

    def __init__(self, pairing: Pairing, min_gap: float = 0.0, max_gap: float | None = None) -> None:
        if not min_gap <= (math.inf if max_gap is None else max_gap):
            raise ValueError(
                f"MarginThreshold(min_gap={min_gap}, max_gap={max_gap}) must satisfy min_gap <= max_gap"
            )
        self.pairing = pairing
        self.min_gap = min_gap
        self.max_gap = max_gap
        self.most_pairs = pairing.most_pairs

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        """Return the pairs of the other rule with ``min_gap <= gap <= max_gap``."""
        highest = math.inf if self.max_gap is None else self.max_gap
        rewards = responses.rewards.tolist()
        return [
            Choice(chosen, rejected)
            for chosen, rejected in self.pairing.pairs(responses, generator)
            if self.min_gap <= rewards[chosen] - rewards[rejected] <= highest
        ]


def _ordered_pairs(rewards: Tensor) -> Tensor:
    """Return the rows of every pair whose first response has the higher reward, ``[pairs, 2]``, by row numbers."""
    return (rewards[:, None] > rewards[None, :]).nonzero()


def _choices(rows: Tensor) -> list[Choice]:
    return [Choice(chosen, rejected) for chosen, rejected in rows.tolist()]


def _checked_most(owner: str, most_pairs: int) -> int:
    if most_pairs < 1:
        raise ValueError(f"{owner}.most_pairs={most_pairs} must be at least 1")
    return most_pairs


class TopPairs(Pairing):
    """The pairs with the largest reward gap; with one pair a prompt, :class:`BestWorst`.

    Args:
        most_pairs: pairs of a prompt, fewer where it has no more with different rewards.
    """

    def __init__(self, most_pairs: int) -> None:
        self.most_pairs = _checked_most("TopPairs", most_pairs)

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        """Return the pairs by descending gap, ties by the row of the chosen, then of the rejected response."""
        rewards = responses.rewards
        rows = _ordered_pairs(rewards)
        gaps = rewards[rows[:, 0]] - rewards[rows[:, 1]]
        return _choices(rows[gaps.argsort(descending=True, stable=True)[: self.most_pairs]])


class RandomPairs(Pairing):
    """Random pairs of responses with different rewards, the higher one chosen.

    Args:
        most_pairs: pairs of a prompt, fewer where it has no more with different rewards.
    """

    def __init__(self, most_pairs: int = 1) -> None:
        self.most_pairs = _checked_most("RandomPairs", most_pairs)

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        """Return pairs drawn without replacement."""
        return _random_pairs(responses.rewards, self.most_pairs, generator)


class MatchedRandomPairs(Pairing):
    """As many random pairs of each prompt as another rule chooses: that rule's size-matched control.

    Args:
        pairing: the other rule.
    """

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self.most_pairs = pairing.most_pairs

    def pairs(self, responses: Responses, generator: torch.Generator) -> Sequence[Choice]:
        """Return pairs drawn without replacement, the higher reward chosen."""
        return _random_pairs(responses.rewards, len(self.pairing.pairs(responses, generator)), generator)


def _random_pairs(rewards: Tensor, count: int, generator: torch.Generator) -> list[Choice]:
    rows = _ordered_pairs(rewards)
    return _choices(rows[torch.randperm(len(rows), generator=generator)[:count]])
