"""DPO under other divergences from the reference than the reverse Kullback-Leibler one. Shapes: B pairs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_lightning.losses.protocol import (
    LossInputs,
    PairValues,
    PreferenceLoss,
    PreferenceTerms,
    check_positive,
)


class Divergence(ABC):
    """An f-divergence between policy and reference; chosen in the config by ``class_path``.

    A subclass needs :meth:`slope` only. A constant in it cancels in the margin.
    """

    @abstractmethod
    def slope(self, log_ratios: Tensor) -> Tensor:
        """Return ``f'(u)`` at ``u = exp(log_ratios)``, ``[B]``, less its value at 1."""


class ForwardKL(Divergence):
    """Forward Kullback-Leibler divergence, ``f'(u) = 1 - 1/u``: covers all that the reference may say."""

    def slope(self, log_ratios: Tensor) -> Tensor:
        """Return ``1 - exp(-d)``."""
        return -torch.expm1(-log_ratios)


class JensenShannon(Divergence):
    """Jensen-Shannon divergence, ``f'(u) = log(2u / (1 + u))``: between forward and reverse."""

    def slope(self, log_ratios: Tensor) -> Tensor:
        """Return ``log 2 + log sigmoid(d)``."""
        return math.log(2) + logsigmoid(log_ratios)


class AlphaDivergence(Divergence):
    """α-divergence, ``f'(u) = (1 - u^-α) / α``: reverse Kullback-Leibler near α = 0, forward near 1.

    Args:
        alpha: α as in the paper, in (0, 1); TRL's ``f_alpha_divergence_coef`` is 1 - α.
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"AlphaDivergence.alpha={alpha} must lie in (0, 1)")
        self.alpha = alpha

    def slope(self, log_ratios: Tensor) -> Tensor:
        """Return ``(1 - exp(-alpha d)) / alpha``."""
        return -torch.expm1(-self.alpha * log_ratios) / self.alpha


class FDivergenceDPOLoss(PreferenceLoss):
    r"""DPO under another divergence: less mode-seeking than DPO. Where responses lose their variety.

    Wang et al., arXiv 2309.16240, with ``u = policy(y|x) / reference(y|x)``:

    .. math:: L = -\log\sigma(\beta f'(u_w) - \beta f'(u_l))

    Args:
        beta: strength of the pull towards the reference; greater than 0.
        divergence: ``ForwardKL``, ``JensenShannon``, ``AlphaDivergence`` or one of your own. The reverse
            Kullback-Leibler divergence is :class:`~sppo_lightning.losses.DPOLoss`.
    """

    def __init__(self, beta: float, divergence: Divergence) -> None:
        check_positive(self, beta=beta)
        self.beta = beta
        self.divergence = divergence

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        """Return the loss and the implicit rewards ``beta * f'(u)`` of each pair, 0 where the two models agree."""
        rewards = PairValues(*map(self.divergence.slope, inputs.log_ratios)).scaled(self.beta)
        return PreferenceTerms.of(-logsigmoid(rewards.margin), rewards)
