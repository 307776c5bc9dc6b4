"""Every loss that TRL has gives TRL's values and gradients, pair by pair.

The golden values come from ``golden/record_losses.py``, which says how and with which version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.losses import LOSSES, Pair, inputs, policy_tokens

from sppo_lightning.losses import CombinedLoss, PairLogps, PreferenceLoss

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "support/golden/trl_losses.json").read_text()
)
PAIRS = [Pair(**pair) for pair in RECORDED["pairs"]]
NAMES = {  # ours by TRL's
    "sigmoid": "dpo",
    "aot": "conservative_dpo",
    "robust": "robust_dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "length_normalized_dpo",
    "sft": "nll",
    "ld": "ld_dpo",
    "forward_kl": "forward_kl",
    "js_divergence": "jensen_shannon",
    "alpha_divergence": "alpha",
    "wpo": "wpo",
    "wpo_aligned": "wpo_aligned",
    "rpo": "rpo",
    "kto": "kto",
    "simpo": "simpo",
}


def measured(loss: PreferenceLoss, pairs: list[Pair]) -> tuple[list[float], list[list[list[float]]]]:
    """Each pair's loss, and its gradient in the log-probs of tokens."""
    tokens = PairLogps(*(side.requires_grad_() for side in policy_tokens(pairs)))
    found = loss.terms(inputs(pairs, tokens)).loss
    gradients = torch.autograd.grad(found.sum(), tokens, allow_unused=True)
    both = zip(*(torch.zeros_like(tokens[0]) if side is None else side for side in gradients), strict=True)
    return found.tolist(), [
        [side[: len(row)].tolist() for side, row in zip(sides, pair[:2], strict=True)]
        for sides, pair in zip(both, pairs, strict=True)
    ]


def check(loss: PreferenceLoss, recorded: dict[str, Any]) -> None:
    values, gradients = measured(loss, PAIRS)
    assert values == pytest.approx(recorded["loss"], rel=1e-6, abs=1e-6)
    for ours, theirs in zip(gradients, recorded["gradient"], strict=True):
        for our_side, their_side in zip(ours, theirs, strict=True):
            assert our_side == pytest.approx(their_side, rel=1e-6, abs=1e-6)


def test_all_of_trls_losses_are_here() -> None:
    recorded = RECORDED.keys() - {"versions", "settings", "changes", "pairs"}
    assert recorded == NAMES.keys() | {"orpo"}


@pytest.mark.parametrize("name", NAMES)
def test_equals_trl(name: str) -> None:
    check(LOSSES[NAMES[name]], RECORDED[name])


def test_orpo_without_its_likelihood_equals_trl() -> None:
    """TRL's likelihood is over the prompt's tokens too, so that only the rest can be compared."""
    values, gradients = measured(LOSSES["orpo"], PAIRS)
    nll, of_nll = measured(LOSSES["nll"], PAIRS)
    rest = [value - own for value, own in zip(values, nll, strict=True)]
    assert rest == pytest.approx(RECORDED["orpo"]["loss"], rel=1e-5, abs=1e-6)
    for ours, own, theirs in zip(gradients, of_nll, RECORDED["orpo"]["gradient"], strict=True):
        for our_side, own_side, their_side in zip(ours, own, theirs, strict=True):
            without = [value - part for value, part in zip(our_side, own_side, strict=True)]
            assert without == pytest.approx(their_side, rel=1e-5, abs=1e-6)


def test_a_sum_of_trls_losses() -> None:
    loss = CombinedLoss(
        {name: LOSSES[ours] for name, ours in NAMES.items()},
        {name: 0.5 + place for place, name in enumerate(NAMES)},
    )
    expected = [
        sum((0.5 + place) * RECORDED[name]["loss"][row] for place, name in enumerate(NAMES))
        for row in range(len(PAIRS))
    ]
    assert measured(loss, PAIRS)[0] == pytest.approx(expected, rel=1e-6)
