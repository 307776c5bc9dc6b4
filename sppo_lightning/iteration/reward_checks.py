"""Checks of an iteration's rules and the loss against what the reward gives."""

from __future__ import annotations

from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.losses import PreferenceLoss
from sppo_lightning.rewards import Reward
from sppo_lightning.selection import EasyToHard, HardToEasy
from sppo_lightning.types import WIN_PROBABILITY, UserError


def check_comparative(reward: Reward, rules: IterationRules) -> None:
    """Refuse what a reward that compares a prompt's responses with each other cannot give.

    Responses that are sampled in two steps would be compared apart; and where the rewards themselves are comparisons,
    their mean over a prompt's responses is the same for every prompt, so that there is no difficulty.

    Raises:
        UserError: naming the key to change.
    """
    if not reward.comparative:
        return
    if rules.probe_samples < rules.samples_per_prompt:
        raise UserError(
            f"data.reward {type(reward).__name__} compares a prompt's responses with each other, so that all have to "
            f"be there at once: set data.probe_samples={rules.samples_per_prompt}"
        )
    if reward.gives_difficulty:
        return
    name = f"data.reward {type(reward).__name__} compares a prompt's responses with each other"
    for slot, rule in rules.keeping.items():
        if {"difficulty", "mean_reward"} & set(rule.requires):
            raise UserError(
                f"{name}, so that every prompt has the same mean reward and data.{slot} {type(rule).__name__} has "
                "nothing to choose by: use a rule that needs no difficulty"
            )
    if isinstance(rules.curriculum, EasyToHard | HardToEasy):
        raise UserError(
            f"{name}, so that every prompt has the same mean reward and data.curriculum "
            f"{type(rules.curriculum).__name__} has nothing to order by: use RandomOrder"
        )


def check_win_probabilities(reward: Reward, rules: IterationRules) -> None:
    """Refuse a rule that reads win probabilities where the reward gives none.

    Raises:
        UserError: naming the rule and the reward.
    """
    wanted = [name for name in rules.pair_selection.requires if name.endswith(WIN_PROBABILITY)]
    if wanted and not reward.gives_win_probabilities:
        raise UserError(
            f"data.pair_selection: {type(rules.pair_selection).__name__} needs the column {wanted[0]!r}, but "
            f"data.reward {type(reward).__name__} gives no win probabilities: use PairwiseReward, or another rule"
        )


def check_loss(loss: PreferenceLoss, rules: IterationRules, reward: Reward) -> None:
    """Refuse a loss that reads what the reward does not give, and a rule that reads what the loss has not computed.

    Raises:
        UserError: naming the key to change.
    """
    if loss.needs_win_probabilities and not reward.gives_win_probabilities:
        raise UserError(
            f"model.loss {type(loss).__name__} needs win probabilities, but data.reward {type(reward).__name__} gives "
            "none: use PairwiseReward, put the reward into WinProbabilityReward, or use another loss"
        )
    rule = rules.pair_selection
    missing = [name for name in rule.requires if name.startswith("reference_")]
    if missing and not loss.needs_reference:
        raise UserError(
            f"data.pair_selection {type(rule).__name__} needs {missing[0]!r}, but model.loss {type(loss).__name__} "
            "reads no reference, so that none is computed: use another rule or loss"
        )
