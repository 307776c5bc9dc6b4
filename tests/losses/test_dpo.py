"""Preference losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppo_lightning.losses import DPOLoss, PairLogps, dpo_loss

QUICK = settings(max_examples=50, deadline=None)
LOGPS = st.lists(st.tuples(*[st.floats(-50, 0) for _ in range(4)]), min_size=1, max_size=5)
BETAS = st.floats(0.01, 2)
SMOOTHINGS = st.floats(0, 0.49)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(rows: list[tuple[float, ...]]) -> tuple[PairLogps, PairLogps]:
    """Rows of (policy chosen, policy rejected, reference chosen, reference rejected)."""
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return PairLogps(*columns[:2]), PairLogps(*columns[2:])


L3 = math.log(3)
POLICY = PairLogps(tensor(-5, -4 + L3, -7), tensor(-6, -8 - L3, -2 + 2 * L3))
REFERENCE = PairLogps(tensor(-4, -4, -7), tensor(-5, -8, -2))


def test_dpo_golden() -> None:
    """Three pairs with beta = 1/2.

    Log-ratios (chosen, rejected): (-1, -1), (ln 3, -ln 3), (0, 2 ln 3); times beta, the implicit rewards:
    (-1/2, -1/2), (ln 3 / 2, -ln 3 / 2), (0, ln 3). Margins: 0, ln 3, -ln 3. As sigma(ln 3) = 3/4 and
    sigma(-ln 3) = 1/4, the losses are ln 2, ln(4/3), ln 4.
    """
    terms = dpo_loss(POLICY, REFERENCE, beta=0.5)
    torch.testing.assert_close(terms.loss, tensor(math.log(2), math.log(4 / 3), math.log(4)))
    torch.testing.assert_close(terms.chosen_reward, tensor(-0.5, L3 / 2, 0))
    torch.testing.assert_close(terms.rejected_reward, tensor(-0.5, -L3 / 2, L3))


def test_label_smoothing_golden() -> None:
    """The same pairs with epsilon = 1/5: 4/5 of the loss plus 1/5 of the flipped pair's.

    ln 2; 4/5 ln(4/3) + 1/5 ln 4; 4/5 ln 4 + 1/5 ln(4/3).
    """
    terms = dpo_loss(POLICY, REFERENCE, beta=0.5, label_smoothing=0.2)
    low, high = math.log(4 / 3), math.log(4)
    torch.testing.assert_close(
        terms.loss, tensor(math.log(2), 0.8 * low + 0.2 * high, 0.8 * high + 0.2 * low)
    )
    torch.testing.assert_close(terms.chosen_reward, tensor(-0.5, L3 / 2, 0))


@QUICK
@given(rows=LOGPS, beta=BETAS, smoothing=SMOOTHINGS)
def test_equal_policy_and_reference_give_ln_2_and_no_reward(
    rows: list[tuple[float, ...]], beta: float, smoothing: float
) -> None:
    policy, _ = pairs(rows)
    terms = dpo_loss(policy, policy, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(terms.loss, torch.full_like(policy.chosen, math.log(2)))
    assert not bool(terms.chosen_reward.any())
    assert not bool(terms.rejected_reward.any())


@QUICK
@given(rows=LOGPS, beta=BETAS, smoothing=SMOOTHINGS, shifts=st.tuples(st.floats(-9, 9), st.floats(-9, 9)))
def test_a_constant_on_policy_and_reference_changes_nothing(
    rows: list[tuple[float, ...]], beta: float, smoothing: float, shifts: tuple[float, float]
) -> None:
    """One constant for both chosen log-probs, another one for both rejected log-probs."""
    policy, reference = pairs(rows)
    chosen, rejected = shifts
    before = dpo_loss(policy, reference, beta=beta, label_smoothing=smoothing)
    after = dpo_loss(
        PairLogps(policy.chosen + chosen, policy.rejected + rejected),
        PairLogps(reference.chosen + chosen, reference.rejected + rejected),
        beta=beta,
        label_smoothing=smoothing,
    )
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@QUICK
@given(rows=LOGPS, beta=BETAS)
def test_swapping_chosen_and_rejected_negates_the_margin(rows: list[tuple[float, ...]], beta: float) -> None:
    """And since -log sigma(-m) = -log sigma(m) + m, the swapped loss is higher by exactly the margin."""
    policy, reference = pairs(rows)
    terms = dpo_loss(policy, reference, beta=beta)
    swapped = dpo_loss(PairLogps(*policy[::-1]), PairLogps(*reference[::-1]), beta=beta)
    margin = terms.chosen_reward - terms.rejected_reward
    torch.testing.assert_close(swapped.chosen_reward - swapped.rejected_reward, -margin)
    torch.testing.assert_close(swapped.loss, terms.loss + margin)


@QUICK
@given(rows=LOGPS, beta=BETAS, smoothing=SMOOTHINGS)
def test_pairs_do_not_mix(rows: list[tuple[float, ...]], beta: float, smoothing: float) -> None:
    together = dpo_loss(*pairs(rows), beta=beta, label_smoothing=smoothing).loss
    alone = [dpo_loss(*pairs([row]), beta=beta, label_smoothing=smoothing).loss for row in rows]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4)]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        reference = PairLogps(*draws[2:])
        return dpo_loss(PairLogps(chosen, rejected), reference, beta=0.7, label_smoothing=smoothing).loss

    assert torch.autograd.gradcheck(loss, [draw.requires_grad_() for draw in draws[:2]])


def test_gradient_golden() -> None:
    """dL/d(chosen) = -beta sigma(-m) = -dL/d(rejected), eq. 7's gradient.

    For margins 0, ln 3, -ln 3 and beta = 1/2: -1/4, -1/8, -3/8.
    """
    policy = PairLogps(*(part.clone().requires_grad_() for part in POLICY))
    dpo_loss(policy, REFERENCE, beta=0.5).loss.sum().backward()
    assert policy.chosen.grad is not None
    torch.testing.assert_close(policy.chosen.grad, tensor(-1 / 4, -1 / 8, -3 / 8))
    torch.testing.assert_close(policy.rejected.grad, tensor(1 / 4, 1 / 8, 3 / 8))


def test_smoothing_is_least_at_a_finite_margin() -> None:
    """The gradient in the margin is sigma(m) - (1 - epsilon), so it vanishes at m = ln((1 - eps) / eps)."""
    chosen = tensor(math.log(0.9 / 0.1) / 0.5).requires_grad_()
    zero = tensor(0)
    dpo_loss(
        PairLogps(chosen, zero), PairLogps(zero, zero), beta=0.5, label_smoothing=0.1
    ).loss.sum().backward()
    torch.testing.assert_close(chosen.grad, zero)


def test_rewards_carry_no_gradient() -> None:
    policy = PairLogps(*(part.clone().requires_grad_() for part in POLICY))
    terms = dpo_loss(policy, REFERENCE, beta=0.5)
    assert terms.loss.requires_grad
    assert not terms.chosen_reward.requires_grad
    assert not terms.rejected_reward.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chosen", [-1e4, 1e4])
def test_extreme_margins_stay_finite(chosen: float, smoothing: float) -> None:
    logp, zero = torch.tensor([chosen], requires_grad=True), torch.zeros(1)
    terms = dpo_loss(PairLogps(logp, zero), PairLogps(zero, zero), beta=1, label_smoothing=smoothing)
    terms.loss.sum().backward()
    weight = smoothing if chosen > 0 else 1 - smoothing
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([1e4 * weight]))
    torch.testing.assert_close(logp.grad, torch.tensor([weight if chosen > 0 else -weight]))


def test_class_is_the_function_with_its_settings() -> None:
    for left, right in zip(
        DPOLoss(beta=0.3, label_smoothing=0.2)(POLICY, REFERENCE)[:3],
        dpo_loss(POLICY, REFERENCE, beta=0.3, label_smoothing=0.2)[:3],
        strict=True,
    ):
        assert left.tolist() == right.tolist()
    assert (
        DPOLoss(0.3)(POLICY, REFERENCE).loss.tolist() == dpo_loss(POLICY, REFERENCE, beta=0.3).loss.tolist()
    )


@pytest.mark.parametrize("beta", [0, -0.1, float("nan")])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"^DPOLoss\.beta={beta} must be greater than 0$"):
        DPOLoss(beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1, float("nan")])
def test_bad_label_smoothing(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"^DPOLoss\.label_smoothing={smoothing} must lie in \[0, 0\.5\)$"):
        DPOLoss(0.1, smoothing)
