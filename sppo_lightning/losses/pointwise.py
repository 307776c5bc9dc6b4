"""Losses that look at each response by itself, so that they say where it goes and not only how far it is ahead.

Shapes: B pairs. With ``d = log policy(y|x) - log reference(y|x)``, summed over a response's tokens, nats: ``d_w`` of
the chosen response, ``d_l`` of the rejected one.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_lightning.losses.protocol import (
    LossInputs,
    PairValues,
    PreferenceLoss,
    PreferenceTerms,
    check_positive,
)


class SPPOLoss(PreferenceLoss):
    r"""SPPO with sure preferences: the chosen response won, the rejected one lost.

    Eq. 4.7 of Wu et al., arXiv 2405.00675, with win probabilities 1 and 0, as TRL's ``sppo_hard``:

    .. math:: L = (d_w - 1/(2\beta))^2 + (d_l + 1/(2\beta))^2

    For self-play without win probabilities; :class:`SPPOSoftLoss` reads them.

    Args:
        beta: inverse of the paper's step size η, per nat; greater than 0. A sure win aims at a log-ratio of
            ``1 / (2 beta)`` nats; the paper's experiments take 0.001.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair, win probabilities less a half."""
        ratios, target = inputs.log_ratios, 1 / (2 * self.beta)
        loss = (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2
        return PreferenceTerms.of(loss, ratios.scaled(self.beta))


class SPPOSoftLoss(PreferenceLoss):
    r"""SPPO with win probabilities: each response's log-ratio regresses on how often it beats the policy's others.

    Eq. 4.7 of Wu et al., arXiv 2405.00675, as in the authors' code (github.com/uclaml/SPPO), with P the mean
    probability that a response beats the prompt's other ones:

    .. math:: L = \frac12 ((d_w - (P_w - \frac12)/\beta)^2 + (d_l - (P_l - \frac12)/\beta)^2)

    With sure preferences it is half of :class:`SPPOLoss`. For self-play with a reward that gives win probabilities:
    ``PairwiseReward``, or any other one inside ``WinProbabilityReward``.

    Args:
        beta: inverse of the paper's step size η, per nat; greater than 0. A sure win aims at a log-ratio of
            ``1 / (2 beta)`` nats; the paper's experiments take 0.001.
    """

    needs_win_probabilities = True

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair, win probabilities less a half."""
        ratios = inputs.log_ratios
        targets = PairValues(*(probability - 0.5 for probability in inputs.win_probabilities)).scaled(
            1 / self.beta
        )
        loss = ((ratios.chosen - targets.chosen) ** 2 + (ratios.rejected - targets.rejected) ** 2) / 2
        return PreferenceTerms.of(loss, ratios.scaled(self.beta))


class APOZeroLoss(PreferenceLoss):
    r"""APO-zero: the chosen response rises, the rejected one falls. Where chosen ones beat the policy's usual answer.

    Eq. 7 of D'Oosterlinck et al., arXiv 2408.06266:

    .. math:: L = 1 - \sigma(\beta d_w) + \sigma(\beta d_l)

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        return PreferenceTerms.of(1 - rewards.chosen.sigmoid() + rewards.rejected.sigmoid(), rewards)


class APODownLoss(PreferenceLoss):
    r"""APO-down: both responses fall, the rejected one more. Where the policy is better than the chosen ones.

    Eq. 8 of D'Oosterlinck et al., arXiv 2408.06266:

    .. math:: L = \sigma(\beta d_w) + 1 - \sigma(\beta(d_w - d_l))

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        return PreferenceTerms.of(rewards.chosen.sigmoid() + 1 - rewards.margin.sigmoid(), rewards)


class KTOPairLoss(PreferenceLoss):
    r"""KTO on pairs: each response against a reference point instead of against the other. For noisy pairs.

    Ethayarajh et al., arXiv 2402.01306, with both weights 1 and the mean over the two responses:

    .. math:: L = \frac12 (1 - \sigma(\beta(d_w - z_w)) + 1 - \sigma(\beta(z_l - d_l)))

    The paper's reference point z is the policy's divergence from the reference, estimated from other pairs of the
    batch. Here it is estimated from the pair alone, so that it depends on no batch: ``z_w = max(0, d_l)`` and
    ``z_l = max(0, d_w)``, without gradient, as the paper has it. These are the values of TRL's former ``kto_pair``
    on batches of one pair; TRL took the mean over the batch, and let the gradient through.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        won = (rewards.chosen - _reference_point(rewards.rejected)).sigmoid()
        lost = (_reference_point(rewards.chosen) - rewards.rejected).sigmoid()
        return PreferenceTerms.of((1 - won + 1 - lost) / 2, rewards)


def _reference_point(reward: Tensor) -> Tensor:
    return reward.detach().clamp(min=0)


class NCAPairLoss(PreferenceLoss):
    r"""NCA on pairs: noise contrast, which keeps the chosen response's own probability up. For reasoning data.

    Chen et al., arXiv 2402.05369, for two responses of which one is right, as TRL's ``nca_pair``:

    .. math:: L = -\log\sigma(\beta d_w) - \frac12\log\sigma(-\beta d_w) - \frac12\log\sigma(-\beta d_l)

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        noise = logsigmoid(-rewards.chosen) + logsigmoid(-rewards.rejected)
        return PreferenceTerms.of(-logsigmoid(rewards.chosen) - noise / 2, rewards)
