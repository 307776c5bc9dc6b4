"""DPO and what changes its margin: the logistic losses of the difference of two log-ratios.

Shapes: B pairs, T tokens of the longest response. With ``d = log policy(y|x) - log reference(y|x)``, of the chosen
response ``d_w``, of the rejected one ``d_l``, nats, all read the margin ``d_w - d_l``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_lightning.losses.protocol import (
    LossInputs,
    PairLogps,
    PairValues,
    PreferenceLoss,
    PreferenceTerms,
    check_label_smoothing,
    check_not_negative,
    check_positive,
    log_ratios,
)


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
    rewards = log_ratios(policy, reference).scaled(beta)
    margin = rewards.margin
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PreferenceTerms.of(loss, rewards)


class DPOLoss(PreferenceLoss):
    """:func:`dpo_loss` with its settings: the loss to start with.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        check_positive(self, beta=beta)
        check_label_smoothing(self, label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        """Return :func:`dpo_loss` of the pairs."""
        return dpo_loss(policy, reference, beta=self.beta, label_smoothing=self.label_smoothing)


class RobustDPOLoss(PreferenceLoss):
    r"""Robust DPO: unbiased where a known share of the labels is wrong. For a noisy reward.

    Chowdhury et al., arXiv 2403.00409, with L the loss of DPO and L' that of the flipped pair:

    .. math:: ((1-ε)\,L - ε\,L') / (1 - 2ε)

    Unlike conservative DPO it subtracts the flipped pair's loss, and has no lower bound.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        label_smoothing: ε, probability that a label is wrong, in [0, 0.5).
    """

    def __init__(self, beta: float, label_smoothing: float) -> None:
        check_positive(self, beta=beta)
        check_label_smoothing(self, label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair."""
        rewards = inputs.log_ratios.scaled(self.beta)
        kept, flipped = -logsigmoid(rewards.margin), -logsigmoid(-rewards.margin)
        wrong = self.label_smoothing
        return PreferenceTerms.of(((1 - wrong) * kept - wrong * flipped) / (1 - 2 * wrong), rewards)


class DPOPLoss(PreferenceLoss):
    r"""DPO-Positive: DPO that pays for a chosen response below the reference. Where both log-probs fall.

    Eq. 3 of Pal et al., arXiv 2402.13228:

    .. math:: L = -\log\sigma(\beta(d_w - d_l - λ\max(0, -d_w)))

    Its gradient jumps where ``d_w`` is 0. Under ``reference: previous_iteration`` every iteration starts there, and
    rounding decides whether the first step pays.

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        penalty: λ, in nats of margin for each nat that the chosen response has lost; 0 or more. The paper takes 50.
    """

    def __init__(self, beta: float, penalty: float) -> None:
        check_positive(self, beta=beta)
        check_not_negative(self, penalty=penalty)
        self.beta = beta
        self.penalty = penalty

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * d`` of each pair, which are DPO's."""
        ratios = inputs.log_ratios
        lost = (-ratios.chosen).clamp(min=0)
        loss = -logsigmoid(self.beta * (ratios.margin - self.penalty * lost))
        return PreferenceTerms.of(loss, ratios.scaled(self.beta))


class LDDPOLoss(PreferenceLoss):
    r"""LD-DPO: DPO in which the longer response's surplus tokens count less. Where responses grow longer.

    Liu et al., arXiv 2409.06411: with ``d_t`` of token t and n the length of the pair's shorter response,

    .. math:: d = \sum_{t \le n} d_t + α\sum_{t > n} d_t, \qquad L = -\log\sigma(\beta(d_w - d_l))

    Args:
        beta: strength of the pull towards the reference, per nat; greater than 0.
        alpha: weight of the surplus tokens, in [0, 1]; 1 is DPO.
    """

    needs_token_logps = True

    def __init__(self, beta: float, alpha: float) -> None:
        check_positive(self, beta=beta)
        if not 0 <= alpha <= 1:
            raise ValueError(f"LDDPOLoss.alpha={alpha} must lie in [0, 1]")
        self.beta = beta
        self.alpha = alpha

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards of each pair, ``beta`` times the weighted sums."""
        assert inputs.policy_tokens is not None, "needs_token_logps"
        assert inputs.reference_tokens is not None, "needs_token_logps"
        shorter = torch.minimum(*inputs.lengths)
        by_token = log_ratios(inputs.policy_tokens, inputs.reference_tokens)
        rewards = PairValues(*(self._weighted(side, shorter) for side in by_token)).scaled(self.beta)
        return PreferenceTerms.of(-logsigmoid(rewards.margin), rewards)

    def _weighted(self, tokens: Tensor, shorter: Tensor) -> Tensor:
        """Return ``[B]`` sums of ``[B, T]`` values, those past the ``[B]`` lengths ``shorter`` weighted."""
        surplus = torch.arange(tokens.shape[1], device=tokens.device) >= shorter[:, None]
        return torch.where(surplus, self.alpha * tokens, tokens).sum(-1)
