"""The contract of a preference loss: what it may read of a micro-batch of pairs, and what it says of each pair.

Shapes: B pairs, T tokens of the longest response. Log-probs are in nats; a response's is the sum over its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """Log-probs of both responses of each pair."""

    chosen: Tensor  # [B]; of single tokens [B, T], 0 after a response's end
    rejected: Tensor  # the same


class PairValues(NamedTuple):
    """A number of both responses of each pair."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]

    @property
    def margin(self) -> Tensor:
        """Chosen less rejected, ``[B]``."""
        return self.chosen - self.rejected

    def scaled(self, factor: float) -> PairValues:
        """Return both times ``factor``."""
        return PairValues(factor * self.chosen, factor * self.rejected)

    def over(self, divisor: PairValues) -> PairValues:
        """Return both divided by those of ``divisor``, e.g. log-probs by lengths: nats a token."""
        return PairValues(self.chosen / divisor.chosen, self.rejected / divisor.rejected)


class LossInputs(NamedTuple):
    """What a preference loss may read of the pairs of a micro-batch; log-probs carry the gradient."""

    policy: PairLogps  # [B] each, float64
    reference: PairLogps  # [B] each, float64; NaN unless the loss needs a reference
    lengths: PairValues  # tokens, float64
    rewards: PairValues  # float64
    win_probabilities: (
        PairValues  # against the prompt's other responses, in [0, 1], float64; NaN where none is known
    )
    policy_tokens: PairLogps | None = None  # [B, T] each, float64; only if the loss needs them
    reference_tokens: PairLogps | None = (
        None  # [B, T] each, float64; only if the loss needs them and a reference
    )
    collision_entropy: PairValues | None = None  # [B] each, float64, no gradient; only if the loss needs it
    """-log of the sum of squared probabilities (Rényi's entropy of order 2), summed over a response's tokens, nats."""

    @property
    def log_ratios(self) -> PairValues:
        """Log-probs under the policy less those under the reference, ``[B]`` each, nats."""
        return log_ratios(self.policy, self.reference)

    @property
    def mean_logps(self) -> PairValues:
        """Mean log-probs of tokens under the policy, ``[B]`` each, nats a token."""
        return PairValues(*self.policy).over(self.lengths)


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairValues:
    """Return log-probs under the policy less those under the reference, of the same shape, nats."""
    return PairValues(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


class PreferenceTerms(NamedTuple):
    """What a preference loss says of each pair."""

    loss: Tensor  # [B], to be minimised
    chosen_reward: Tensor  # [B], implicit reward of the chosen response, no gradient
    rejected_reward: Tensor  # [B], implicit reward of the rejected response, no gradient
    parts: Mapping[
        str, Tensor
    ] = {}  # [B] each, no gradient: logged as ``train/<name>``, see PreferenceLoss.parts

    @classmethod
    def of(cls, loss: Tensor, rewards: PairValues) -> PreferenceTerms:
        """Return the terms of a loss that was made of implicit rewards, which are detached here."""
        return cls(loss, rewards.chosen.detach(), rewards.rejected.detach())


class PreferenceLoss:
    """A loss on preference pairs, chosen in the config by ``class_path``.

    A subclass defines :meth:`terms`, or only ``__call__(policy, reference)`` where the summed log-probs of both are
    all that it reads.
    """

    needs_reference: bool = True
    """Whether it reads the reference's log-probs; without, no reference pass is made."""
    needs_token_logps: bool = False
    """Whether it reads the log-probs of single tokens; with a reference, the reference's are stored too."""
    needs_collision_entropy: bool = False
    """Whether it reads the policy's collision entropy; that costs another pass over the logits."""
    needs_win_probabilities: bool = False
    """Whether it reads win probabilities; a reward that gives none is refused."""
    has_implicit_rewards: bool = True
    """Whether its implicit rewards say which response it prefers; those of a term that is only added do not."""
    averages_over_tokens: bool = False
    """Whether it reads log-ratios as means over tokens, so that a bonus for each token changes nothing."""
    parts: tuple[str, ...] = ()
    """Names of the :attr:`PreferenceTerms.parts` that it returns. An instance may say its own of all these."""

    def __init_subclass__(cls) -> None:
        """Refuse a class that defines neither way to compute the loss."""
        super().__init_subclass__()
        if cls.terms is PreferenceLoss.terms and cls.__call__ is PreferenceLoss.__call__:
            raise TypeError(f"{cls.__name__} must define terms(inputs), or __call__(policy, reference)")

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards of each pair."""
        return self(inputs.policy, inputs.reference)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        """Return :meth:`terms` of pairs of which nothing but summed log-probs is known."""
        unknown = PairValues(*(torch.full_like(side, torch.nan) for side in reference))
        return self.terms(LossInputs(policy, reference, unknown, unknown, unknown))


def check_positive(owner: object, **settings: float) -> None:
    """Refuse settings of a class that are not finite numbers greater than 0.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be greater than 0")
        _check_finite(owner, name, value)


def check_not_negative(owner: object, **settings: float) -> None:
    """Refuse settings of a class that are not finite numbers of 0 or more.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be 0 or more")
        _check_finite(owner, name, value)


def check_label_smoothing(owner: object, label_smoothing: float) -> None:
    """Refuse a probability of a wrong label that is not in [0, 0.5).

    Raises:
        ValueError: naming the setting.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{type(owner).__name__}.label_smoothing={label_smoothing} must lie in [0, 0.5)")


def _check_finite(owner: object, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{type(owner).__name__}.{name}={value} must be finite")
