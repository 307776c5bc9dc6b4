"""Losses made of losses: sums, weights, and what a config may get wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from support.losses import CONFIGS, LOSSES, Pair, config, inputs, made

import sppo_lightning.losses as package
from sppo_lightning.losses import (
    ChosenNLL,
    CombinedLoss,
    DPOLoss,
    LengthRegularization,
    LossInputs,
    ORPOLoss,
    PolicyConfidence,
    PreferenceLoss,
    PreferenceTerms,
    RewardGap,
    SimPOLoss,
    SPPOSoftLoss,
    WeightedLoss,
)
from sppo_lightning.training.metrics import StepMetrics

PAIRS = [
    Pair([-1.0, -0.5], [-3.0], [-2.0, -1.5], [-2.0]),
    Pair([-2.0], [-1.0, -2.0, -3.0], [-1.0], [-0.5, -1.5, -1.0]),
]


class Unusable(PreferenceLoss):
    """NaN, so that it must not reach a sum."""

    needs_reference = False
    has_implicit_rewards = False

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        unknown = torch.full_like(inputs.policy.chosen, math.nan)
        return PreferenceTerms(unknown, unknown, unknown)


def test_a_weighted_sum_with_its_parts() -> None:
    loss = CombinedLoss({"nll": ChosenNLL(), "dpo": DPOLoss(0.5)}, {"nll": 0.25, "dpo": 2.0})
    nll, dpo = (one.terms(inputs(PAIRS)) for one in loss.losses.values())
    terms = loss.terms(inputs(PAIRS))
    torch.testing.assert_close(terms.loss, 0.25 * nll.loss + 2 * dpo.loss)
    assert terms.parts["loss/nll"].tolist() == nll.loss.tolist()
    assert terms.parts["loss/dpo"].tolist() == dpo.loss.tolist()
    # the likelihood, which comes first, prefers nothing
    assert terms.chosen_reward.tolist() == dpo.chosen_reward.tolist()
    assert terms.rejected_reward.tolist() == dpo.rejected_reward.tolist()


def test_needs_what_its_losses_need() -> None:
    soft, simpo, nll = SPPOSoftLoss(0.1), SimPOLoss(2.0, 1.0), ChosenNLL()
    both = CombinedLoss({"a": simpo, "b": nll}, {"a": 1.0, "b": 1.0})
    assert not both.needs_reference
    assert not both.needs_win_probabilities
    assert CombinedLoss({"a": both, "b": soft}, {"a": 1.0, "b": 1.0}).needs_win_probabilities
    assert CombinedLoss({"a": both, "b": soft}, {"a": 1.0, "b": 1.0}).needs_reference
    assert CombinedLoss({"a": nll, "b": LOSSES["ld_dpo"]}, {"a": 1.0, "b": 1.0}).needs_token_logps
    for wrapped in (LengthRegularization(soft, 0.1), WeightedLoss(soft, PolicyConfidence())):
        assert wrapped.needs_win_probabilities
        assert wrapped.needs_reference
    assert not WeightedLoss(simpo, PolicyConfidence()).needs_reference
    assert WeightedLoss(LOSSES["ld_dpo"], PolicyConfidence()).needs_token_logps
    aligned = LOSSES["wpo_aligned"]
    assert CombinedLoss({"a": nll, "b": aligned}, {"a": 1.0, "b": 1.0}).needs_collision_entropy
    assert LengthRegularization(aligned, 0.1).needs_collision_entropy
    assert WeightedLoss(aligned, RewardGap(1.0)).needs_collision_entropy
    assert not both.needs_collision_entropy


def test_a_loss_of_weight_0_is_logged_only() -> None:
    loss = CombinedLoss({"watched": Unusable(), "dpo": DPOLoss(0.5)}, {"watched": 0.0, "dpo": 1.0})
    terms = loss.terms(inputs(PAIRS))
    assert terms.loss.tolist() == DPOLoss(0.5).terms(inputs(PAIRS)).loss.tolist()
    assert bool(terms.parts["loss/watched"].isnan().all())


def test_likelihood_alone_says_how_likely_both_are() -> None:
    terms = CombinedLoss({"nll": ChosenNLL()}, {"nll": 1.0}).terms(inputs(PAIRS))
    assert terms.chosen_reward.tolist() == [-0.75, -2]
    assert terms.rejected_reward.tolist() == [-3, -2]


def test_parts_of_parts_are_logged_apart() -> None:
    """Whatever is put into what, no two numbers share a name, nor one with what every step logs."""
    inner = CombinedLoss({"orpo": ORPOLoss(0.1), "nll": ChosenNLL()}, {"orpo": 1.0, "nll": 1.0})
    weighted = WeightedLoss(WeightedLoss(inner, RewardGap(1.0)), PolicyConfidence())
    outer = CombinedLoss(
        {"loss": weighted, "lr": LOSSES["wpo"], "rewards": ChosenNLL(), "x": LOSSES["r_dpo"]},
        {"loss": 1.0, "lr": 1.0, "rewards": 1.0, "x": 1.0},
    )
    terms = outer.terms(inputs(PAIRS))
    assert tuple(terms.parts) == outer.parts
    assert {"loss/loss", "loss/loss/weight", "loss/loss/weighted/weight", "loss/lr/weight"} <= set(
        outer.parts
    )
    metrics = StepMetrics(outer)
    assert len(set(metrics.names)) == len(metrics.names)
    metrics.update(inputs(PAIRS).policy, inputs(PAIRS).reference, terms, torch.ones(2))
    logged = metrics.result()
    assert logged["train/loss"].item() == pytest.approx(terms.loss.mean().item())
    assert logged["train/loss/rewards"].item() == pytest.approx((0.75 + 2) / 2)


class Greedy(PreferenceLoss):
    """Logs under a name that is taken."""

    def __init__(self, part: str) -> None:
        self.parts = (part,)

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        raise NotImplementedError


@pytest.mark.parametrize("part", ["loss", "lr", "rewards/margin", "logratios/chosen"])
def test_a_part_under_a_name_that_is_taken_is_refused(part: str) -> None:
    message = (
        rf"^model\.loss Greedy: its part '{part}' would be logged as train/{part}, where something else is"
    )
    with pytest.raises(ValueError, match=message):
        StepMetrics(Greedy(part))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("ab", {"a": 1.0}, r"losses without a weight: b; weights without a loss: none$"),
        ("a", {"a": 1.0, "c": 1.0}, r"losses without a weight: none; weights without a loss: c$"),
        ("a", {"a": math.nan}, r"^CombinedLoss\.weights\.a=nan must be a finite number of 0 or more$"),
        ("a", {"a": math.inf}, r"^CombinedLoss\.weights\.a=inf must be a finite number of 0 or more$"),
        ("a", {"a": -1.0}, r"^CombinedLoss\.weights\.a=-1\.0 must be a finite number of 0 or more$"),
        (
            "ab",
            {"a": 0.0, "b": 0.0},
            r"^CombinedLoss\.weights=\{'a': 0\.0, 'b': 0\.0\} sum to 0: give one loss a weight greater than 0$",
        ),
        ("", {}, r"^CombinedLoss\.weights=\{\} sum to 0"),
        ("/", {"/": 1.0}, r"^CombinedLoss\.losses: the name '/' must be a word without a slash$"),
    ],
)
def test_weights_that_do_not_fit(names: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinedLoss({name: ChosenNLL() for name in names}, weights)


@pytest.mark.parametrize(
    ("name", "init_args", "message"),
    [
        (
            "RobustDPOLoss",
            {"beta": 0.1, "label_smoothing": 0.5},
            r"label_smoothing=0\.5 must lie in \[0, 0\.5\)$",
        ),
        (
            "EXOPairLoss",
            {"beta": 0.1, "label_smoothing": 0.0},
            r"label_smoothing=0\.0 must lie in \(0, 0\.5\)$",
        ),
        ("LDDPOLoss", {"beta": 0.1, "alpha": 1.5}, r"alpha=1\.5 must lie in \[0, 1\]$"),
        ("AlphaDivergence", {"alpha": 1.0}, r"alpha=1\.0 must lie in \(0, 1\)$"),
        ("DPOPLoss", {"beta": 0.1, "penalty": -1.0}, r"penalty=-1\.0 must be 0 or more$"),
        ("DPOPLoss", {"beta": 0.1, "penalty": math.inf}, r"penalty=inf must be finite$"),
        ("SimPOLoss", {"beta": 2.0, "gamma": -0.5}, r"gamma=-0\.5 must be 0 or more$"),
        ("REBELLoss", {"eta": 0.0}, r"eta=0\.0 must be greater than 0$"),
        ("DiscoPOPLoss", {"beta": 0.1, "tau": 0.0}, r"tau=0\.0 must be greater than 0$"),
        ("RewardGap", {"scale": math.nan}, r"scale=nan must be greater than 0$"),
    ],
)
def test_settings_out_of_range(name: str, init_args: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\.{message}"):
        getattr(package, name)(**init_args)


@pytest.mark.parametrize(
    ("loss", "alpha", "message"),
    [
        (DPOLoss(0.1), 0.0, r"^LengthRegularization\.alpha=0\.0 must be greater than 0$"),
        (SimPOLoss(2.0, 1.0), 0.1, r"^LengthRegularization\.loss: SimPOLoss reads no reference"),
        (LOSSES["ipo"], 0.1, r"^LengthRegularization\.loss: IPOLoss averages over tokens"),
        (
            CombinedLoss({"a": LOSSES["ipo"], "b": ChosenNLL()}, {"a": 1.0, "b": 1.0}),
            0.1,
            r"^LengthRegularization\.loss: CombinedLoss averages over tokens",
        ),
    ],
)
def test_length_regularisation_that_would_do_nothing(
    loss: PreferenceLoss, alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LengthRegularization(loss, alpha)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.averages_over_tokens])
def test_what_averages_over_tokens_cannot_be_charged_for_them(name: str) -> None:
    """A nat on each token of both models' responses, which sums would notice."""
    charged = [
        pair._replace(
            policy_chosen=[value + 1 for value in pair[0]], policy_rejected=[value + 1 for value in pair[1]]
        )
        for pair in PAIRS
    ]
    before, after = (LOSSES[name].terms(inputs(some)) for some in (PAIRS, charged))
    margins = [terms.chosen_reward - terms.rejected_reward for terms in (before, after)]
    torch.testing.assert_close(*margins)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_yaml(name: str) -> None:
    again: Any = made(yaml.safe_load(yaml.safe_dump(CONFIGS[name])))
    assert again.terms(inputs(PAIRS)).loss.tolist() == LOSSES[name].terms(inputs(PAIRS)).loss.tolist()


def test_a_weighting_is_no_loss() -> None:
    with pytest.raises(Exception, match="PolicyConfidence"):
        made(config("PolicyConfidence"))
