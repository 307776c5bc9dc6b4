"""Preference losses: pure functions of sequence log-probs, and the classes that a config names.

Shapes: B pairs. Log-probs are sums over the response's tokens, in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """Sequence log-probs of both responses of each pair."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]


class PreferenceTerms(NamedTuple):
    """What a preference loss says of each pair."""

    loss: Tensor  # [B], to be minimised
    chosen_reward: Tensor  # [B], implicit reward of the chosen response, no gradient
    rejected_reward: Tensor  # [B], implicit reward of the rejected response, no gradient


class PreferenceLoss(ABC):
    """A loss on preference pairs, chosen in the config by ``class_path``."""

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        """Return the loss and the implicit rewards of each pair."""


def dpo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0
) -> PreferenceTerms:
    r"""Direct preference optimisation.

    With :math:`r(x, y) = \beta \log\frac{\pi_\theta(y|x)}{\pi_{ref}(y|x)}`, eq. 7 of Rafailov et al.,
    arXiv 2305.18290:

    .. math:: L = -\log\sigma(r_w - r_l)

    With label smoothing ε, the preference is taken to be flipped with probability ε
    (conservative DPO, https://ericmitchell.ai/cdpo.pdf):

    .. math:: L = -(1-ε)\log\sigma(r_w - r_l) - ε\log\sigma(r_l - r_w)

    Args:
        policy: log-probs under the policy, ``[B]`` each, nats.
        reference: log-probs under the frozen reference, ``[B]`` each, nats.
        beta: strength of the pull towards the reference, per nat.
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    """
    chosen_reward = beta * (policy.chosen - reference.chosen)
    rejected_reward = beta * (policy.rejected - reference.rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PreferenceTerms(loss, chosen_reward.detach(), rejected_reward.detach())


class DPOLoss(PreferenceLoss):
    """:func:`dpo_loss` with its settings.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        if not beta > 0:
            raise ValueError(f"DPOLoss.beta={beta} must be greater than 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"DPOLoss.label_smoothing={label_smoothing} must lie in [0, 0.5)")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        """Return :func:`dpo_loss` of the pairs."""
        return dpo_loss(policy, reference, beta=self.beta, label_smoothing=self.label_smoothing)
