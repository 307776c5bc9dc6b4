"""What holds of every loss, whatever its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import CONFIGS, LOSSES, Pair, inputs, policy_tokens

import sppo_lightning.losses as package
from sppo_lightning.losses import LossInputs, PairLogps, PreferenceLoss

QUICK = settings(max_examples=25, deadline=None)
SIDES = st.integers(1, 4).flatmap(
    lambda length: st.tuples(*[st.lists(st.floats(-8, -0.01), min_size=length, max_size=length)] * 2)
)
PAIRS = st.lists(
    st.builds(
        lambda chosen, rejected, rewards, wins: Pair(
            chosen[0], rejected[0], chosen[1], rejected[1], rewards, wins
        ),
        SIDES,
        SIDES,
        st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
        st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=4,
)
ALL = pytest.mark.parametrize("name", LOSSES)
WITH_REFERENCE = [name for name, loss in LOSSES.items() if loss.needs_reference]
OF_THE_POLICY_ALONE = {"rpo", "wpo", "wpo_aligned"}  # a part or a weight of them is
DETACHED = {"kto", "wpo", "wpo_aligned"}  # in part; test_against_trl has their gradients
NOT_FALLING = {  # the chosen response has a likelihood to reach, or to stay at
    *(
        "conservative_dpo",
        "summed_ipo",
        "ipo",
        "rebel",
        "exo",
        "discopop",
        "sppo",
        "sppo_soft",
        "apo_down",
        "nca",
    ),
}
UNBOUNDED = {"forward_kl", "alpha"}  # their slope grows as exp(-d)
SOME = [
    Pair([-1.0, -0.5, -2.5], [-3.0, -1.5], [-1.5, -1.0, -2.0], [-2.0, -1.25], (2.0, 0.5), (0.75, 0.125)),
    Pair([-2.0], [-0.5, -0.25, -1.0, -0.75], [-0.5], [-1.0, -0.5, -0.75, -0.5], (0.5, 0.25), (0.5, 0.5)),
]


def test_every_loss_is_tested() -> None:
    classes = [value for value in vars(package).values() if isinstance(value, type)]
    losses = {
        one.__name__ for one in classes if issubclass(one, PreferenceLoss) and one is not PreferenceLoss
    }
    assert losses == {type(loss).__name__ for loss in LOSSES.values()}


@ALL
@QUICK
@given(pairs=PAIRS)
def test_pairs_do_not_mix(name: str, pairs: list[Pair]) -> None:
    """Nor does it matter how far a batch is padded: so accumulation and the number of processes change nothing."""
    together = LOSSES[name].terms(inputs(pairs))
    alone = [LOSSES[name].terms(inputs([pair])) for pair in pairs]
    for place in range(3):
        torch.testing.assert_close(together[place], torch.cat([terms[place] for terms in alone]))
    for part in together.parts:
        torch.testing.assert_close(together.parts[part], torch.cat([terms.parts[part] for terms in alone]))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - DETACHED))
def test_gradients_are_those_of_the_loss(name: str) -> None:
    chosen, rejected = policy_tokens(SOME)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return LOSSES[name].terms(inputs(SOME, PairLogps(chosen, rejected))).loss

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@ALL
def test_nothing_but_the_loss_carries_a_gradient(name: str) -> None:
    tokens = PairLogps(*(side.requires_grad_() for side in policy_tokens(SOME)))
    loss = LOSSES[name]
    terms = loss.terms(inputs(SOME, tokens))
    assert terms.loss.requires_grad
    assert terms.loss.shape == (2,)
    assert tuple(terms.parts) == loss.parts
    for value in (terms.chosen_reward, terms.rejected_reward, *terms.parts.values()):
        assert not value.requires_grad
        assert value.shape == (2,)


@ALL
def test_reads_no_more_than_it_says(name: str) -> None:
    """Neither a reference nor tokens nor win probabilities, where they are not asked for."""
    loss, full = LOSSES[name], inputs(SOME)
    unknown = torch.full((2,), math.nan, dtype=torch.float64)
    given_less = full._replace(
        reference=full.reference if loss.needs_reference else PairLogps(unknown, unknown),
        win_probabilities=(
            full.win_probabilities
            if loss.needs_win_probabilities
            else full.win_probabilities._replace(chosen=unknown, rejected=unknown)
        ),
        policy_tokens=full.policy_tokens if loss.needs_token_logps else None,
        reference_tokens=full.reference_tokens if loss.needs_token_logps else None,
        collision_entropy=full.collision_entropy if loss.needs_collision_entropy else None,
    )
    assert loss.terms(given_less).loss.tolist() == loss.terms(full).loss.tolist()


def test_what_each_needs() -> None:
    def those(attribute: str) -> set[str]:
        return {name for name, loss in LOSSES.items() if getattr(loss, attribute)}

    assert set(LOSSES) - those("needs_reference") == {"simpo", "orpo", "nll"}
    assert those("needs_token_logps") == {"ld_dpo"}
    assert those("needs_collision_entropy") == {"wpo_aligned"}
    assert those("needs_win_probabilities") == {"sppo_soft"}
    assert set(LOSSES) - those("has_implicit_rewards") == {"nll"}


@pytest.mark.parametrize("name", sorted(set(WITH_REFERENCE) - {"r_dpo"}))
@QUICK
@given(pairs=PAIRS)
def test_no_implicit_reward_where_policy_and_reference_agree(name: str, pairs: list[Pair]) -> None:
    same = [pair._replace(reference_chosen=pair[0], reference_rejected=pair[1]) for pair in pairs]
    terms = LOSSES[name].terms(inputs(same))
    assert not bool(terms.chosen_reward.any())
    assert not bool(terms.rejected_reward.any())


@pytest.mark.parametrize("name", sorted(set(WITH_REFERENCE) - OF_THE_POLICY_ALONE))
@QUICK
@given(pairs=PAIRS, shifts=st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
def test_a_constant_on_policy_and_reference_changes_nothing(
    name: str, pairs: list[Pair], shifts: tuple[float, float]
) -> None:
    """One constant for the tokens of both chosen responses, another one for those of both rejected ones."""
    moved = [
        pair._replace(
            policy_chosen=[value + shifts[0] for value in pair[0]],
            policy_rejected=[value + shifts[1] for value in pair[1]],
            reference_chosen=[value + shifts[0] for value in pair[2]],
            reference_rejected=[value + shifts[1] for value in pair[3]],
        )
        for pair in pairs
    ]
    before, after = (LOSSES[name].terms(inputs(some)) for some in (pairs, moved))
    for place in range(3):
        torch.testing.assert_close(before[place], after[place], rtol=1e-9, atol=1e-9)


@ALL
@QUICK
@given(pairs=PAIRS)
def test_swapping_chosen_and_rejected_swaps_their_rewards(name: str, pairs: list[Pair]) -> None:
    terms = LOSSES[name].terms(inputs(pairs))
    swapped = LOSSES[name].terms(inputs([pair.swapped() for pair in pairs]))
    torch.testing.assert_close(swapped.chosen_reward, terms.rejected_reward)
    torch.testing.assert_close(swapped.rejected_reward, terms.chosen_reward)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NOT_FALLING))
@QUICK
@given(pairs=PAIRS)
def test_falls_as_the_chosen_response_becomes_likelier(name: str, pairs: list[Pair]) -> None:
    tokens = PairLogps(*(side.requires_grad_() for side in policy_tokens(pairs)))
    LOSSES[name].terms(inputs(pairs, tokens)).loss.sum().backward()
    assert tokens.chosen.grad is not None
    assert bool((tokens.chosen.grad <= 0).all())
    if tokens.rejected.grad is not None:
        assert bool((tokens.rejected.grad >= 0).all())


@pytest.mark.parametrize("name", sorted(set(LOSSES) - UNBOUNDED))
@pytest.mark.parametrize("far", [-1e4, -1e-12])
def test_extreme_log_probs_stay_finite(name: str, far: float) -> None:
    """A response that the policy finds impossible, or sure, the other one the opposite."""
    pairs = [Pair([far], [-1e4 - far], [-1.0], [-1.0])]
    tokens = PairLogps(*(side.requires_grad_() for side in policy_tokens(pairs)))
    loss = LOSSES[name].terms(inputs(pairs, tokens)).loss
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    for side in tokens:
        assert side.grad is None or bool(side.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]["init_args"].get("beta")])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_bad_beta(name: str, beta: float) -> None:
    loss = LOSSES[name]
    arguments = {key: value for key, value in vars(loss).items() if key != "beta"}
    kind = type(loss).__name__
    wanted = "be finite" if beta == math.inf else "be greater than 0"
    with pytest.raises(ValueError, match=rf"^{kind}\.beta={beta} must {wanted}$"):
        type(loss)(beta=beta, **arguments)


def test_a_loss_of_summed_log_probs_can_be_called_with_them() -> None:
    full: LossInputs = inputs(SOME)
    called = LOSSES["robust_dpo"](full.policy, full.reference)
    assert called.loss.tolist() == LOSSES["robust_dpo"].terms(full).loss.tolist()
