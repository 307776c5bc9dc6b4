"""Preference losses: pure functions of response log-probs, and the classes that a config names.

Shapes: B pairs, T tokens of the longest response. Log-probs are in nats; a response's is the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """Log-probs of both responses of each pair."""

    chosen: Tensor  # [B]; of single tokens [B, T], 0 after a response's end
    rejected: Tensor  # the same


class PairValues(NamedTuple):
    """A number of both responses of each pair."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]


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


class PreferenceTerms(NamedTuple):
    """What a preference loss says of each pair."""

    loss: Tensor  # [B], to be minimised
    chosen_reward: Tensor  # [B], implicit reward of the chosen response, no gradient
    rejected_reward: Tensor  # [B], implicit reward of the rejected response, no gradient
    parts: Mapping[
        str, Tensor
    ] = {}  # [B] each, no gradient: logged as ``train/<name>``, see PreferenceLoss.parts


class PreferenceLoss:
    """A loss on preference pairs, chosen in the config by ``class_path``.

    A subclass defines :meth:`terms`, or only ``__call__(policy, reference)`` where the summed log-probs of both are
    all that it reads.
    """

    needs_reference: ClassVar[bool] = True
    """Whether it reads the reference's log-probs; without, no reference pass is made."""
    needs_token_logps: ClassVar[bool] = False
    """Whether it reads the log-probs of single tokens; with a reference, the reference's are stored too."""
    parts: tuple[str, ...] = ()
    """Names of the :attr:`PreferenceTerms.parts` that it returns; an instance may say its own."""

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
