"""Losses made of other losses. Shapes: B pairs, T tokens of the longest response."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sppo_lightning.losses.protocol import (
    LossInputs,
    PairLogps,
    PreferenceLoss,
    PreferenceTerms,
    check_positive,
)


class CombinedLoss(PreferenceLoss):
    """The weighted sum of several losses, each of which is logged under ``train/loss/<name>``, without its weight.

    A loss of weight 0 is logged only. The implicit rewards are those of the first loss that has some and counts:
    an added term such as :class:`~sppo_lightning.losses.ChosenNLL` has none. What a loss logs itself stands under
    ``train/loss/<name>/<part>``.

    Args:
        losses: what is summed, by name.
        weights: of each loss, under the same names; 0 or more.
    """

    def __init__(self, losses: dict[str, PreferenceLoss], weights: dict[str, float]) -> None:
        _check_weights(losses, weights)
        self.losses = losses
        self.weights = weights
        found = list(losses.values())
        counting = [name for name in losses if weights[name] > 0]
        preferring = [name for name in counting if losses[name].has_implicit_rewards]
        self.needs_reference = any(loss.needs_reference for loss in found)
        self.needs_token_logps = any(loss.needs_token_logps for loss in found)
        self.needs_collision_entropy = any(loss.needs_collision_entropy for loss in found)
        self.needs_win_probabilities = any(loss.needs_win_probabilities for loss in found)
        self.has_implicit_rewards = bool(preferring)
        self.averages_over_tokens = all(losses[name].averages_over_tokens for name in counting)
        self.parts = tuple(
            part for name, loss in losses.items() for part in (_part(name), *_parts_of(name, loss.parts))
        )
        self._rewards_from = (preferring or counting)[0]

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the weighted sum, and the implicit rewards of the first loss that has some."""
        found = {name: loss.terms(inputs) for name, loss in self.losses.items()}
        total = sum(
            self.weights[name] * terms.loss for name, terms in found.items() if self.weights[name] > 0
        )
        parts: dict[str, Tensor] = {}
        for name, terms in found.items():
            parts[_part(name)] = terms.loss.detach()
            parts |= {
                joined: terms.parts[part]
                for part, joined in zip(terms.parts, _parts_of(name, terms.parts), strict=True)
            }
        rewards = found[self._rewards_from]
        assert isinstance(total, Tensor), "some weight is greater than 0"
        return PreferenceTerms(total, rewards.chosen_reward, rewards.rejected_reward, parts)


def _part(name: str) -> str:
    return f"loss/{name}"


def _parts_of(name: str, parts: Iterable[str]) -> list[str]:
    return [f"{_part(name)}/{part}" for part in parts]


def _check_weights(losses: dict[str, PreferenceLoss], weights: dict[str, float]) -> None:
    if set(losses) != set(weights):
        lacking = ", ".join(sorted(set(losses) - set(weights))) or "none"
        unknown = ", ".join(sorted(set(weights) - set(losses))) or "none"
        raise ValueError(
            f"CombinedLoss.weights must have the names of losses; losses without a weight: {lacking}; "
            f"weights without a loss: {unknown}"
        )
    for name, weight in weights.items():
        if not name or "/" in name:
            raise ValueError(f"CombinedLoss.losses: the name {name!r} must be a word without a slash")
        if not 0 <= weight < math.inf:
            raise ValueError(f"CombinedLoss.weights.{name}={weight} must be a finite number of 0 or more")
    if not any(weights.values()):
        raise ValueError(f"CombinedLoss.weights={weights} sum to 0: give one loss a weight greater than 0")


class LengthRegularization(PreferenceLoss):
    r"""Another loss with a charge for length: a response counts as preferred only as far as it is not just longer.

    Park et al. (R-DPO), arXiv 2403.19159: where what is sought is the labels' reward less a charge for each token, the
    reward that explains a label is ``beta * (d + α|y|)``, so that the loss reads

    .. math:: d + α|y| \quad \text{in the place of} \quad d

    of both responses; DPO becomes R-DPO, :math:`-\log\sigma(\beta Δ + \beta α(|y_w| - |y_l|))`. Where responses grow
    longer from iteration to iteration. The implicit rewards include the charge.

    Args:
        loss: reads log-ratios of a reference, summed over tokens.
        alpha: α, nats a token; greater than 0. The paper's is ``beta`` times this.
    """

    def __init__(self, loss: PreferenceLoss, alpha: float) -> None:
        check_positive(self, alpha=alpha)
        name = type(loss).__name__
        if not loss.needs_reference:
            raise ValueError(
                f"LengthRegularization.loss: {name} reads no reference, so that there is nothing to charge"
            )
        if loss.averages_over_tokens:
            raise ValueError(
                f"LengthRegularization.loss: {name} averages over tokens, so that a charge for each changes nothing"
            )
        self.loss = loss
        self.alpha = alpha
        self.needs_token_logps = loss.needs_token_logps
        self.needs_collision_entropy = loss.needs_collision_entropy
        self.needs_win_probabilities = loss.needs_win_probabilities
        self.has_implicit_rewards = loss.has_implicit_rewards
        self.parts = loss.parts

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the other loss's terms, of log-ratios with the charge."""
        reference, lengths = inputs.reference, inputs.lengths
        charged = PairLogps(
            *(side - self.alpha * length for side, length in zip(reference, lengths, strict=True))
        )
        tokens = inputs.reference_tokens
        if tokens is not None:
            tokens = PairLogps(
                *(self._charged(side, length) for side, length in zip(tokens, lengths, strict=True))
            )
        return self.loss.terms(inputs._replace(reference=charged, reference_tokens=tokens))

    def _charged(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Return ``[B, T]`` log-probs less the charge, up to each response's end."""
        inside = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
        return torch.where(inside, tokens - self.alpha, tokens)
