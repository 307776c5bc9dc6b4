"""Rules against the prompts: too few for a step, and keys that a prompt lacks."""

from __future__ import annotations

from typing import Any

import pytest
from support.rules import iteration_rules

from sppo_lightning.iteration.rule_checks import check_sizes, set_up_rules
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.pairing import BestWorst
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.selection import (
    AllOf,
    AllPairs,
    CategoryBandit,
    Easiest,
    MatchedRandomSubset,
    PerCategory,
)
from sppo_lightning.types import Prompt, UserError

IDS = [f"p{number}" for number in range(10)]


class Three(BestWorst):
    most_pairs = 3


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


def prompt_table(*categories: object) -> PromptTable:
    return PromptTable(
        Prompt(f"p{number}", "Say it.", (), metadata={"category": category})
        for number, category in enumerate(categories)
    )


@pytest.mark.parametrize(
    ("changes", "slot"),
    [
        ({"selection": PerCategory(Easiest(0.5))}, "data.selection: PerCategory"),
        ({"selection": AllOf([PerCategory(Easiest(0.5))])}, "data.selection: AllOf"),
        ({"pair_selection": PerCategory(AllPairs())}, "data.pair_selection: PerCategory"),
        ({"schedule": CategoryBandit(0.5)}, "data.schedule: CategoryBandit"),
        ({"schedule": MatchedRandomSubset(CategoryBandit(0.5))}, "data.schedule: MatchedRandomSubset"),
    ],
)
def test_a_key_that_a_prompt_lacks(changes: dict[str, Any], slot: str) -> None:
    message = (
        f"^{slot} reads 'category' of each prompt, but prompt 'p1' in data.prompts has none: add 'category' to the "
        "file, name another key, or use another rule$"
    )
    with pytest.raises(UserError, match=message):
        set_up_rules(rules(**changes), prompt_table("x", None, "y"))
    set_up_rules(rules(**changes), prompt_table("x", 0, ""))  # what is there counts, whatever it is


def test_a_schedule_is_shown_the_prompts_before_it_is_asked() -> None:
    shown = rules(schedule=CategoryBandit(0.5), selection=Easiest(1.0), pairs_per_step=2)
    set_up_rules(shown, prompt_table(*"xxyy"))
    check_sizes(shown, [f"p{number}" for number in range(4)])
