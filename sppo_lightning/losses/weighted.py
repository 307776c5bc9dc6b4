"""Losses whose pairs weigh differently. Shapes: B pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sppo_lightning.losses.protocol import LossInputs, PreferenceLoss, PreferenceTerms, check_positive


class Weighting(ABC):
    """How much a pair weighs; chosen in the config by ``class_path``. A subclass needs :meth:`weights` only.

    A weight may depend on its own pair only, so that batches change nothing.
    """

    needs_win_probabilities: bool = False
    """Whether it reads win probabilities; a reward that gives none is refused."""
    needs_collision_entropy: bool = False
    """Whether it reads the policy's collision entropy."""

    @abstractmethod
    def weights(self, inputs: LossInputs) -> Tensor:
        """Return the weight of each pair, ``[B]``, 0 or more; no gradient goes through it."""


class PolicyConfidence(Weighting):
    r"""WPO: a pair weighs as much as the policy would say both responses itself. For pairs that are not its own.

    Zhou et al., arXiv 2406.11827, with the geometric mean of a response's token probabilities:

    .. math:: w = \exp(l_w/|y_w| + l_l/|y_l|)

    This is the paper's weight before alignment: lower than :class:`AlignedPolicyConfidence` where the policy is unsure
    of itself, so that the learning rate has to make up for its mean, which is logged as ``train/weight``.
    """

    def weights(self, inputs: LossInputs) -> Tensor:
        """Return the product of both mean probabilities, in (0, 1]."""
        means = inputs.mean_logps
        return (means.chosen + means.rejected).exp()


class AlignedPolicyConfidence(Weighting):
    r"""WPO as it is used: confidence beside that of the policy's own responses, whose weights are near 1.

    Zhou et al., arXiv 2406.11827, "sampled alignment", as in the authors' code and TRL's ``use_weighting``. H is the
    collision entropy at each token, :math:`-\log\sum_v p(v)^2`, the log of what a sampled token's probability is on
    average, summed over the response:

    .. math:: w = \exp((l_w + H_w)/|y_w| + (l_l + H_l)/|y_l|)
    """

    needs_collision_entropy = True

    def weights(self, inputs: LossInputs) -> Tensor:
        """Return the product of both, greater than 0; above 1 for responses that are likelier than sampled ones."""
        assert inputs.collision_entropy is not None, "needs_collision_entropy"
        means, entropies = inputs.mean_logps, inputs.collision_entropy.over(inputs.lengths)
        return (means.chosen + entropies.chosen + means.rejected + entropies.rejected).exp()


class RewardGap(Weighting):
    r"""A pair weighs by the gap of its rewards: near-ties, whose labels are least sure, count least. For noisy rewards.

    A form of this project's own. With P the probability that the chosen response is the better one under a
    Bradley-Terry model of the rewards:

    .. math:: w = P - (1 - P) = \tanh((r_w - r_l) / (2s)), \qquad P = \sigma((r_w - r_l)/s)

    Args:
        scale: s, the gap of rewards at which the better response wins by 73 %, in units of the reward; greater than 0.
    """

    def __init__(self, scale: float) -> None:
        check_positive(self, scale=scale)
        self.scale = scale

    def weights(self, inputs: LossInputs) -> Tensor:
        """Return the weight of each pair, in [0, 1); 0 where the rejected response has the higher reward."""
        return torch.tanh(inputs.rewards.margin.clamp(min=0) / (2 * self.scale))


class WeightedLoss(PreferenceLoss):
    """Another loss times a weight of each pair, which is logged as ``train/weight``.

    What the other loss logs itself stands under ``train/weighted/<part>``.

    Args:
        loss: what is weighted.
        weighting: says how much a pair weighs.
    """

    def __init__(self, loss: PreferenceLoss, weighting: Weighting) -> None:
        self.loss = loss
        self.weighting = weighting
        self.needs_reference = loss.needs_reference
        self.needs_token_logps = loss.needs_token_logps
        self.needs_collision_entropy = loss.needs_collision_entropy or weighting.needs_collision_entropy
        self.needs_win_probabilities = loss.needs_win_probabilities or weighting.needs_win_probabilities
        self.has_implicit_rewards = loss.has_implicit_rewards
        self.averages_over_tokens = loss.averages_over_tokens
        self.parts = ("weight", *(f"weighted/{part}" for part in loss.parts))

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the weighted loss, and the other loss's implicit rewards."""
        weights = self.weighting.weights(inputs).detach()
        terms = self.loss.terms(inputs)
        inner = {f"weighted/{part}": value for part, value in terms.parts.items()}
        return terms._replace(loss=weights * terms.loss, parts={"weight": weights, **inner})
