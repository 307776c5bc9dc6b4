"""Losses that TRL lacks, on values worked out by hand from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support.losses import Pair, inputs
from torch import Tensor

from sppo_lightning.losses import (
    AlphaDivergence,
    DiscoPOPLoss,
    DPOLoss,
    DPOPLoss,
    EXOPairLoss,
    FDivergenceDPOLoss,
    KTOPairLoss,
    LDDPOLoss,
    LengthRegularization,
    ORPOLoss,
    PreferenceTerms,
    REBELLoss,
    RewardGap,
    SPPOLoss,
    SPPOSoftLoss,
    SummedIPOLoss,
    WeightedLoss,
)

L3 = math.log(3)
# log-ratios (chosen, rejected): (2, -1) and (-1, -3); lengths (2, 1) and (1, 3)
PAIRS = [
    Pair([-1.0, -0.5], [-3.0], [-2.0, -1.5], [-2.0], (3.0, 1.0), (0.75, 0.25)),
    Pair([-2.0], [-1.0, -2.0, -3.0], [-1.0], [-0.5, -1.5, -1.0], (0.5, 0.25), (0.5, 0.625)),
]


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def softplus(value: float) -> float:
    """-log sigmoid(-value)."""
    return math.log1p(math.exp(value))


def rewards(terms: PreferenceTerms) -> list[tuple[float, float]]:
    return list(zip(terms.chosen_reward.tolist(), terms.rejected_reward.tolist(), strict=True))


def test_summed_ipo() -> None:
    """Margins 3 and 2; the target is 1 / (2 * 1/4) = 2: (3 - 2)^2 and 0."""
    terms = SummedIPOLoss(beta=0.25).terms(inputs(PAIRS))
    close(terms.loss, 1, 0)
    assert rewards(terms) == [(0.5, -0.25), (-0.25, -0.75)]


def test_rebel() -> None:
    """Margins 3 and 2, gaps 2 and 1/4; with eta = 4, (3 - 8)^2 and (2 - 1)^2; implicit rewards are ratios / 4."""
    terms = REBELLoss(eta=4).terms(inputs(PAIRS))
    close(terms.loss, 25, 1)
    assert rewards(terms) == [(0.5, -0.25), (-0.25, -0.75)]


def test_sppo_soft() -> None:
    """With beta = 1/8 targets are 8 (P - 1/2): (2, -2) and (0, 1).

    ((2 - 2)^2 + (-1 + 2)^2) / 2 = 1/2; ((-1 - 0)^2 + (-3 - 1)^2) / 2 = 17/2.
    """
    terms = SPPOSoftLoss(beta=0.125).terms(inputs(PAIRS))
    close(terms.loss, 0.5, 8.5)
    assert rewards(terms) == [(0.25, -0.125), (-0.125, -0.375)]


def test_sppo_soft_of_sure_preferences_is_half_of_the_hard_one() -> None:
    sure = inputs([pair._replace(win_probabilities=(1.0, 0.0)) for pair in PAIRS])
    torch.testing.assert_close(
        2 * SPPOSoftLoss(beta=0.1).terms(sure).loss, SPPOLoss(beta=0.1).terms(sure).loss
    )


def test_dpop() -> None:
    """beta = 1/2, penalty 3: the first chosen response has gained; the second has lost 1 nat.

    Margins 3/2, and (2 - 3 * 1) / 2 = -1/2; implicit rewards are DPO's.
    """
    terms = DPOPLoss(beta=0.5, penalty=3).terms(inputs(PAIRS))
    close(terms.loss, softplus(-1.5), softplus(0.5))
    assert rewards(terms) == [(1, -0.5), (-0.5, -1.5)]


def test_dpop_without_penalty_is_dpo() -> None:
    ours, dpo = (loss.terms(inputs(PAIRS)).loss for loss in (DPOPLoss(0.5, 0.0), DPOLoss(0.5)))
    assert ours.tolist() == dpo.tolist()


def test_ld_dpo() -> None:
    """Log-ratios of tokens (1, 1 | -1) and (-1 | -1/2, -1/2, -2); alpha = 1/4 weighs those past the shorter length.

    1 + 1/4 against -1; -1 against -1/2 - 5/8 = -9/8. Times beta = 2: margins 9/2 and 1/4.
    """
    terms = LDDPOLoss(beta=2, alpha=0.25).terms(inputs(PAIRS))
    close(terms.loss, softplus(-4.5), softplus(-0.25))
    assert rewards(terms) == [(2.5, -2), (-2, -2.25)]


def test_ld_dpo_of_whole_responses_is_dpo() -> None:
    ours, dpo = (loss.terms(inputs(PAIRS)).loss for loss in (LDDPOLoss(0.5, 1.0), DPOLoss(0.5)))
    torch.testing.assert_close(ours, dpo)


def test_length_regularisation_of_dpo_is_r_dpo() -> None:
    """beta = 1/2 and alpha = 1/2 nat a token: beta * margin + 1/4 (|y_w| - |y_l|) = 3/2 + 1/4 and 1 - 1/2.

    The implicit rewards are beta * d + |y| / 4.
    """
    terms = LengthRegularization(DPOLoss(0.5), alpha=0.5).terms(inputs(PAIRS))
    close(terms.loss, softplus(-1.75), softplus(-0.5))
    assert rewards(terms) == [(1.5, -0.25), (-0.25, -0.75)]


def test_length_regularisation_reaches_tokens() -> None:
    """Of LD-DPO that weighs all tokens alike it makes R-DPO too."""
    by_token, summed = (
        LengthRegularization(loss, alpha=0.5).terms(inputs(PAIRS)).loss
        for loss in (LDDPOLoss(0.5, 1.0), DPOLoss(0.5))
    )
    torch.testing.assert_close(by_token, summed)


def test_kto_reference_points() -> None:
    """beta = ln 3: the first pair's are max(0, -1) = 0 and max(0, 2) = 2, the second pair's 0 and 0.

    sigma(2 ln 3) = 9/10, sigma(ln 3 (2 + 1)) = 27/28: (1/10 + 1/28) / 2; sigma(-ln 3) = 1/4, sigma(3 ln 3) = 27/28:
    (3/4 + 1/28) / 2.
    """
    close(KTOPairLoss(beta=L3).terms(inputs(PAIRS)).loss, (1 / 10 + 1 / 28) / 2, (3 / 4 + 1 / 28) / 2)


def test_orpo() -> None:
    """Mean probabilities 3/4 and 1/4: odds 3 and 1/3, log odds ratio 2 ln 3, sigma 9/10; nll -ln(3/4)."""
    pair = Pair([math.log(0.75)] * 2, [math.log(0.25)], [0.0] * 2, [0.0])
    terms = ORPOLoss(beta=2).terms(inputs([pair]))
    close(terms.loss, -math.log(0.75) - 2 * math.log(0.9))
    close(terms.parts["nll"], -math.log(0.75))
    close(terms.parts["log_odds_ratio"], 2 * L3)
    close(terms.chosen_reward, 2 * math.log(0.75))


def test_exo_is_least_at_its_labels() -> None:
    """It is a divergence: 0 where sigma(beta * margin) = 1 - epsilon, here 3/4."""
    pair = Pair([0.0], [-L3], [0.0], [0.0])
    close(EXOPairLoss(beta=1, label_smoothing=0.25).terms(inputs([pair])).loss, 0)


def test_discopop_at_margin_0() -> None:
    """Half of the logistic loss ln 2 and half of the exponential one, 1."""
    pair = Pair([-1.0], [-2.0], [-1.0], [-2.0])
    close(DiscoPOPLoss(beta=1).terms(inputs([pair])).loss, (math.log(2) + 1) / 2)


@pytest.mark.parametrize("name", ["near 0", "near 1"])
def test_alpha_divergence_has_both_kl_divergences_at_its_ends(name: str) -> None:
    """Reverse, which is DPO, and forward, whose slope is 1 - exp(-d): margins (1 - e^-2) - (1 - e), and -e + e^3."""
    loss = FDivergenceDPOLoss(1.0, AlphaDivergence(1e-9 if name == "near 0" else 1 - 1e-9))
    margins = (3, 2) if name == "near 0" else (math.e - math.exp(-2), math.exp(3) - math.e)
    found = loss.terms(inputs(PAIRS)).loss
    torch.testing.assert_close(
        found,
        torch.tensor([softplus(-margin) for margin in margins], dtype=torch.float64),
        rtol=1e-6,
        atol=1e-8,
    )


def test_weights_by_reward_gap() -> None:
    """2 sigma(gap / s) - 1: with gaps 2 and 1/4 and s = 2 / ln 3 and s = 1 / (4 ln 3), sigma(ln 3) = 3/4: 1/2."""
    for scale, row in ((2 / L3, 0), (0.25 / L3, 1)):
        terms = WeightedLoss(DPOLoss(0.5), RewardGap(scale)).terms(inputs(PAIRS))
        assert terms.parts["weight"][row].item() == pytest.approx(0.5)
        assert terms.loss[row].item() == pytest.approx(0.5 * softplus((-1.5, -1)[row]))


def test_no_weight_where_the_rejected_response_has_the_higher_reward() -> None:
    found = WeightedLoss(DPOLoss(0.5), RewardGap(1.0)).terms(inputs([pair.swapped() for pair in PAIRS]))
    close(found.loss, 0, 0)
