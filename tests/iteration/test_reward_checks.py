"""Rules and losses against the reward: what they read, and it does not give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.rules import iteration_rules

from sppo_lightning.iteration.reward_checks import check_comparative, check_loss, check_win_probabilities
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.losses import CombinedLoss, DPOLoss, PreferenceLoss, SPPOSoftLoss
from sppo_lightning.rewards import FunctionJudge, FunctionReward, PairwiseReward, WinProbabilityReward
from sppo_lightning.selection import AdaptiveTarget, All, AllPairs, DifficultyPools, Schedule, SkipTied
from sppo_lightning.types import UserError


def rules(**changes: Any) -> IterationRules:
    return iteration_rules(**{"iterations": 1, "pairs_per_step": 8, **changes})


class ByWinProbability(AllPairs):
    requires = ("gap", "chosen_win_probability")


def score(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    return [0.0 for _ in responses]


def test_a_rule_that_reads_win_probabilities_needs_a_reward_that_gives_them() -> None:
    wanting = rules(pair_selection=ByWinProbability())
    message = (
        r"^data\.pair_selection: ByWinProbability needs the column 'chosen_win_probability', but data\.reward "
        r"FunctionReward gives no win probabilities: use PairwiseReward, or another rule$"
    )
    with pytest.raises(UserError, match=message):
        check_win_probabilities(FunctionReward(score), wanting)
    check_win_probabilities(FunctionReward(score), rules())
    check_win_probabilities(PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5)), wanting)


@pytest.mark.parametrize(
    "loss",
    [SPPOSoftLoss(0.1), CombinedLoss({"a": DPOLoss(0.1), "b": SPPOSoftLoss(0.1)}, {"a": 1.0, "b": 1.0})],
)
def test_a_loss_that_reads_win_probabilities_needs_a_reward_that_gives_them(loss: PreferenceLoss) -> None:
    plain = FunctionReward(score)
    message = (
        rf"^model\.loss {type(loss).__name__} needs win probabilities, but data\.reward FunctionReward gives none: use "
        r"PairwiseReward, put the reward into WinProbabilityReward, or use another loss$"
    )
    with pytest.raises(UserError, match=message):
        check_loss(loss, rules(), plain)
    check_loss(loss, rules(), WinProbabilityReward(plain, scale=1.0))
    check_loss(loss, rules(), PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5)))
    check_loss(DPOLoss(0.1), rules(), plain)


def test_win_probabilities_of_a_reward_leave_its_difficulty_to_select_by() -> None:
    """Unlike a judge's, which have the same mean for every prompt; but all responses have to be there at once."""
    reward = WinProbabilityReward(FunctionReward(score), scale=1.0)
    assert "difficulty" in rules().selection.requires
    check_comparative(reward, rules(probe_samples=4))
    with pytest.raises(UserError, match=r"there at once: set data\.probe_samples=4$"):
        check_comparative(reward, rules(probe_samples=2))
    judged = PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5))
    with pytest.raises(UserError, match=r"every prompt has the same mean reward and data\.selection Easiest"):
        check_comparative(judged, rules(probe_samples=4))


@pytest.mark.parametrize(
    "schedule", [DifficultyPools(), AdaptiveTarget(0.5, start=0, step=1, target_reward=0)]
)
def test_a_comparative_reward_gives_a_schedule_no_difficulty(schedule: Schedule) -> None:
    reward = PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5))
    wanting = rules(schedule=schedule, selection=All(), probe_samples=4)
    with pytest.raises(
        UserError, match=rf"data\.schedule {type(schedule).__name__} has nothing to choose by"
    ):
        check_comparative(reward, wanting)
    check_comparative(reward, rules(schedule=SkipTied(), selection=All(), probe_samples=4))
