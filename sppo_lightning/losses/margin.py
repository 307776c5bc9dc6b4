"""Other functions of DPO's margin. Shapes: B pairs.

With ``d = log policy(y|x) - log reference(y|x)``, summed over a response's tokens, nats: ``Δ = d_w - d_l`` of the
chosen response less that of the rejected one.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from sppo_lightning.losses.protocol import LossInputs, PreferenceLoss, PreferenceTerms, check_positive


class HingeLoss(PreferenceLoss):
    r"""Hinge (SLiC): leaves a pair alone once its margin is wide enough. Against over-optimised easy pairs.

    Zhao et al., arXiv 2305.10425, on DPO's margin as in Liu et al., arXiv 2309.06657:

    .. math:: L = \max(0, 1 - \beta Δ)

    Args:
        beta: inverse of the margin that is enough, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        return PreferenceTerms.of((1 - rewards.margin).clamp(min=0), rewards)


class SummedIPOLoss(PreferenceLoss):
    r"""IPO on summed log-ratios, as its paper writes it: a margin to reach, not to widen for ever.

    Eq. 17 of Azar et al., arXiv 2310.12036, with τ = ``beta``:

    .. math:: L = (Δ - 1/(2τ))^2

    The target does not grow with the length of the responses; :class:`IPOLoss` averages over tokens.

    Args:
        beta: τ, strength of the pull towards the reference, per nat; greater than 0.
    """

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        ratios = inputs.log_ratios
        return PreferenceTerms.of((ratios.margin - 1 / (2 * self.beta)) ** 2, ratios.scaled(self.beta))


class REBELLoss(PreferenceLoss):
    r"""REBEL: the margin regresses on the gap of the rewards. Where the reward's size means something.

    Gao et al., arXiv 2404.16767, as in the authors' code (github.com/ZhaolinGao/REBEL):

    .. math:: L = (Δ - η(r_w - r_l))^2

    The rewards are those by which the pair was made. Those of a reward that compares responses are mean win
    probabilities: the paper extends REBEL to general preferences in this way, and η counts nats for a sure win.

    Args:
        eta: η, nats of margin for each unit of reward; greater than 0. A reward scaled by c asks for η / c.
    """

    def __init__(self, eta: float) -> None:
        check_positive(self, eta=eta)
        self.eta = eta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``d / eta`` of each pair, in units of the reward."""
        ratios = inputs.log_ratios
        loss = (ratios.margin - self.eta * inputs.rewards.margin) ** 2
        return PreferenceTerms.of(loss, ratios.scaled(1 / self.eta))


class EXOPairLoss(PreferenceLoss):
    r"""EXO on pairs: the reverse Kullback-Leibler divergence to smoothed labels. Seeks one mode where DPO covers all.

    Eq. 16 of Ji et al., arXiv 2402.00856, for two responses:

    .. math:: L = \sigma(\beta Δ)\log\frac{\sigma(\beta Δ)}{1-ε} + \sigma(-\beta Δ)\log\frac{\sigma(-\beta Δ)}{ε}

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        label_smoothing: ε, probability that a label is wrong, in (0, 0.5); without any the loss is infinite.
    """

    def __init__(self, beta: float, label_smoothing: float) -> None:
        check_positive(self, beta=beta)
        if not 0 < label_smoothing < 0.5:
            raise ValueError(f"EXOPairLoss.label_smoothing={label_smoothing} must lie in (0, 0.5)")
        self.beta = beta
        self.label_smoothing = label_smoothing

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        won, lost = logsigmoid(rewards.margin), logsigmoid(-rewards.margin)
        right, wrong = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        return PreferenceTerms.of(won.exp() * (won - right) + lost.exp() * (lost - wrong), rewards)


class DiscoPOPLoss(PreferenceLoss):
    r"""DiscoPOP (log-ratio modulated loss): logistic below the margin 0, exponential above it.

    Eq. 5 of Lu et al., arXiv 2406.08414, found by a search over losses. With ρ = β Δ and μ = σ(ρ / τ):

    .. math:: L = -(1-μ)\log\sigma(ρ) + μ\,e^{-ρ}

    It is not convex: between ρ = -3τ and a little above 0 it rises with the margin. Under ``reference:
    previous_iteration`` every pair starts there, at 0, and is first pushed to a margin below it. For experiments.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        tau: τ, width of the change from one to the other; greater than 0.
    """

    def __init__(self, beta: float, tau: float = 0.05) -> None:
        check_positive(self, beta=beta, tau=tau)
        self.beta = beta
        self.tau = tau

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        margin = rewards.margin
        logistic = -torch.sigmoid(-margin / self.tau) * logsigmoid(margin)
        # one exponential, as far below 0 the two would be 0 and infinity
        exponential = (logsigmoid(margin / self.tau) - margin).exp()
        return PreferenceTerms.of(logistic + exponential, rewards)
