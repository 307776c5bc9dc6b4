"""Every loss by its config, and pairs for it to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from sppo_lightning.losses import LossInputs, PairLogps, PairValues, PreferenceLoss


def config(name: str, **init_args: Any) -> dict[str, Any]:
    """A class of the package by its public path."""
    return {"class_path": f"sppo_lightning.losses.{name}", "init_args": init_args}


DPO = config("DPOLoss", beta=0.5)
NLL = config("ChosenNLL")
CONFIGS: dict[str, dict[str, Any]] = {
    "dpo": DPO,
    "conservative_dpo": config("DPOLoss", beta=0.5, label_smoothing=0.1),
    "robust_dpo": config("RobustDPOLoss", beta=0.5, label_smoothing=0.2),
    "dpop": config("DPOPLoss", beta=0.5, penalty=4.0),
    "ld_dpo": config("LDDPOLoss", beta=0.5, alpha=0.25),
    "hinge": config("HingeLoss", beta=0.5),
    "summed_ipo": config("SummedIPOLoss", beta=0.5),
    "rebel": config("REBELLoss", eta=2.0),
    "exo": config("EXOPairLoss", beta=0.5, label_smoothing=0.1),
    "discopop": config("DiscoPOPLoss", beta=0.5),
    "sppo": config("SPPOLoss", beta=0.5),
    "sppo_soft": config("SPPOSoftLoss", beta=0.5),
    "apo_zero": config("APOZeroLoss", beta=0.5),
    "apo_down": config("APODownLoss", beta=0.5),
    "kto": config("KTOPairLoss", beta=0.5),
    "nca": config("NCAPairLoss", beta=0.5),
    "ipo": config("IPOLoss", beta=0.5),
    "length_normalized_dpo": config("LengthNormalizedDPOLoss", beta=0.5),
    "simpo": config("SimPOLoss", beta=0.5, gamma=0.75),
    "orpo": config("ORPOLoss", beta=0.5),
    "nll": NLL,
    "forward_kl": config("FDivergenceDPOLoss", beta=0.5, divergence=config("ForwardKL")),
    "jensen_shannon": config("FDivergenceDPOLoss", beta=0.5, divergence=config("JensenShannon")),
    "alpha": config("FDivergenceDPOLoss", beta=0.5, divergence=config("AlphaDivergence", alpha=0.25)),
    "rpo": config("CombinedLoss", losses={"dpo": DPO, "nll": NLL}, weights={"dpo": 1.0, "nll": 0.5}),
    "r_dpo": config("LengthRegularization", loss=DPO, alpha=0.25),
    "wpo": config("WeightedLoss", loss=DPO, weighting=config("PolicyConfidence")),
    "wpo_aligned": config("WeightedLoss", loss=DPO, weighting=config("AlignedPolicyConfidence")),
    "by_gap": config("WeightedLoss", loss=DPO, weighting=config("RewardGap", scale=2.0)),
}


def made(settings: dict[str, Any]) -> PreferenceLoss:
    """Make a loss as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PreferenceLoss)
    loss: PreferenceLoss = parser.instantiate(parser.parse_object({"loss": settings})).loss
    return loss


LOSSES = {name: made(settings) for name, settings in CONFIGS.items()}


class Pair(NamedTuple):
    """Log-probs of the tokens of a pair's responses, nats, and what a reward says of them."""

    policy_chosen: Sequence[float]
    policy_rejected: Sequence[float]
    reference_chosen: Sequence[float]
    reference_rejected: Sequence[float]
    rewards: tuple[float, float] = (1.5, -0.5)
    win_probabilities: tuple[float, float] = (0.75, 0.25)
    collision_entropy: tuple[float, float] = (1.0, 0.5)

    def swapped(self) -> Pair:
        """The pair with chosen and rejected in each other's place."""
        return Pair(
            self.policy_rejected,
            self.policy_chosen,
            self.reference_rejected,
            self.reference_chosen,
            self.rewards[::-1],
            self.win_probabilities[::-1],
            self.collision_entropy[::-1],
        )


def padded(rows: Sequence[Sequence[float]], longest: int) -> Tensor:
    """``[B, T]``, 0 after a row's end."""
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=torch.float64)


def policy_tokens(pairs: Sequence[Pair]) -> PairLogps:
    """The policy's log-probs of tokens, ``[B, T]`` each."""
    longest = max(len(side) for pair in pairs for side in pair[:2])
    return PairLogps(*(padded([pair[side] for pair in pairs], longest) for side in (0, 1)))


def inputs(pairs: Sequence[Pair], tokens: PairLogps | None = None) -> LossInputs:
    """What a loss reads of pairs; ``tokens``: other log-probs of the policy."""
    tokens = policy_tokens(pairs) if tokens is None else tokens
    longest = tokens.chosen.shape[1]
    reference = PairLogps(*(padded([pair[side] for pair in pairs], longest) for side in (2, 3)))

    def values(rows: Sequence[tuple[float, float]]) -> PairValues:
        return PairValues(*torch.tensor(rows, dtype=torch.float64).unbind(1))

    return LossInputs(
        PairLogps(tokens.chosen.sum(-1), tokens.rejected.sum(-1)),
        PairLogps(reference.chosen.sum(-1), reference.rejected.sum(-1)),
        values([(len(pair[0]), len(pair[1])) for pair in pairs]),
        values([pair.rewards for pair in pairs]),
        values([pair.win_probabilities for pair in pairs]),
        tokens,
        reference,
        values([pair.collision_entropy for pair in pairs]),
    )
