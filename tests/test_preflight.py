"""Checks before a run, each alone; in a whole run in integration/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.rules import iteration_rules

from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.pairing import BestWorst
from sppo_lightning.preflight import check_sizes, check_win_probabilities
from sppo_lightning.rewards import FunctionJudge, FunctionReward, PairwiseReward
from sppo_lightning.selection import AllPairs
from sppo_lightning.types import UserError

IDS = [f"p{number}" for number in range(10)]


class Three(BestWorst):
    most_pairs = 3


class ByWinProbability(AllPairs):
    requires = ("gap", "chosen_win_probability")


def rules(**changes: Any) -> IterationRules:
    return iteration_rules(**{"iterations": 1, "pairs_per_step": 8, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"^data\.selection keeps 5 of 10 candidate prompts in iteration 0, fewer than one optimizer step of",
        ),
        (
            {"pairing": Three(), "pairs_per_step": 16},
            r"^data\.selection keeps 15 pairs of 10 candidate prompts in iteration 0, fewer than one optimizer step",
        ),
    ],
)
def test_too_few_prompts_for_a_step(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sizes(rules(**changes), IDS)


def test_several_pairs_of_a_prompt_may_fill_a_step() -> None:
    check_sizes(rules(pairing=Three()), IDS)


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
