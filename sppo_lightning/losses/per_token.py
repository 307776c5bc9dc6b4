"""Losses that read log-probs as means over tokens, so that length by itself earns nothing. Shapes: B pairs.

With ``l = log policy(y|x)`` and ``d`` the same less the reference's, summed over a response's ``|y|`` tokens, nats:
``l_w`` and ``d_w`` of the chosen response, ``l_l`` and ``d_l`` of the rejected one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_lightning.losses.protocol import (
    LossInputs,
    PreferenceLoss,
    PreferenceTerms,
    check_not_negative,
    check_positive,
)

SUREST = -1e-7  # mean log-prob, nats a token: the odds of a sure response would be infinite


class IPOLoss(PreferenceLoss):
    r"""IPO, averaged over tokens: a margin to reach, not to widen for ever. Against over-fitting on sure preferences.

    Eq. 17 of Azar et al., arXiv 2310.12036, with τ = ``beta`` and log-ratios a token, as TRL's ``ipo`` (its authors
    say that the paper's results are of this form); :class:`SummedIPOLoss` does not average:

    .. math:: L = (d_w/|y_w| - d_l/|y_l| - 1/(2τ))^2

    Args:
        beta: τ, strength of the pull towards the reference, per nat a token; greater than 0.
    """

    averages_over_tokens = True

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d / |y|`` of each pair."""
        means = inputs.log_ratios.over(inputs.lengths)
        return PreferenceTerms.of((means.margin - 1 / (2 * self.beta)) ** 2, means.scaled(self.beta))


class LengthNormalizedDPOLoss(PreferenceLoss):
    r"""DPO on mean log-ratios of tokens: long responses weigh no more than short ones.

    Section 5 of Lambert et al. (Tülu 3), arXiv 2411.15124, as TRL's ``sigmoid_norm``:

    .. math:: L = -\log\sigma(\beta(d_w/|y_w| - d_l/|y_l|))

    Args:
        beta: strength of the pull towards the reference, per nat a token; greater than 0, and larger than DPO's.
    """

    averages_over_tokens = True

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d / |y|`` of each pair."""
        rewards = inputs.log_ratios.over(inputs.lengths).scaled(self.beta)
        return PreferenceTerms.of(-logsigmoid(rewards.margin), rewards)


class SimPOLoss(PreferenceLoss):
    r"""SimPO: mean log-probs and a target margin, without a reference. Where there is no memory or time for one.

    Eq. 6 of Meng et al., arXiv 2405.14734:

    .. math:: L = -\log\sigma(\beta\,l_w/|y_w| - \beta\,l_l/|y_l| - γ)

    Nothing pulls towards a reference: keep the learning rate low. No reference pass is made.

    Args:
        beta: scale of the mean log-probs, per nat a token; greater than 0. The paper takes 2 to 10.
        gamma: γ, target margin of the implicit rewards; 0 or more. The authors' code sets γ / β.
    """

    needs_reference = False
    averages_over_tokens = True

    def __init__(self, beta: float, gamma: float) -> None:
        check_positive(self, beta=beta)
        check_not_negative(self, gamma=gamma)
        self.beta = beta
        self.gamma = gamma

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * l / |y|`` of each pair."""
        rewards = inputs.mean_logps.scaled(self.beta)
        return PreferenceTerms.of(-logsigmoid(rewards.margin - self.gamma), rewards)


class ORPOLoss(PreferenceLoss):
    r"""ORPO: fine-tuning on the chosen response and the odds ratio of both, without a reference. From a base model.

    Hong et al., arXiv 2403.07691, with λ = ``beta`` and p the geometric mean of a response's token
    probabilities:

    .. math:: L = -l_w/|y_w| - λ\log\sigma(\log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l})

    The first part is over the response's tokens; TRL's is over the prompt's too. Parts: ``nll``, ``log_odds_ratio``.
    No reference pass is made.

    Args:
        beta: λ, weight of the odds ratio; greater than 0. The paper takes 0.1 to 0.25.
    """

    needs_reference = False
    averages_over_tokens = True
    parts = ("nll", "log_odds_ratio")

    def __init__(self, beta: float) -> None:
        check_positive(self, beta=beta)
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * l / |y|`` of each pair."""
        means = inputs.mean_logps
        nll, log_odds_ratio = -means.chosen, _log_odds(means.chosen) - _log_odds(means.rejected)
        terms = PreferenceTerms.of(nll - self.beta * logsigmoid(log_odds_ratio), means.scaled(self.beta))
        return terms._replace(parts={"nll": nll.detach(), "log_odds_ratio": log_odds_ratio.detach()})


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of ``[B]`` log-probs."""
    logp = logp.clamp(max=SUREST)
    return logp - torch.log(-torch.expm1(logp))


class ChosenNLL(PreferenceLoss):
    r"""Negative log-likelihood of the chosen response, a token: added to another loss so that it does not unlearn it.

    Pang et al. (RPO), arXiv 2404.19733, with the mean over the response's own tokens, pair by pair; TRL's
    ``sft`` averages over all tokens of a batch, so that long responses count more:

    .. math:: L = -l_w/|y_w|

    By itself it is fine-tuning on the chosen responses, and its implicit rewards are mean log-probs. No reference pass
    is made for it.
    """

    needs_reference = False
    has_implicit_rewards = False
    averages_over_tokens = True

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss, and the mean log-probs of tokens as implicit rewards, of each pair."""
        means = inputs.mean_logps
        return PreferenceTerms.of(-means.chosen, means)
