"""What the rules of an iteration are checked for, and what they keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support.rules import iteration_rules
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.pairing import BestWorst, Pairing
from sppo_lightning.selection import CategoryBandit, Easiest, HighestPVar, PerCategory, Schedule, Selection
from sppo_lightning.types import UserError


class Counting(Selection):
    """Keeps every row, and counts how often it was asked."""

    def __init__(self, state: Any = None) -> None:
        self.state = {"asked": 0} if state is None else state

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        self.state["asked"] += 1
        return torch.ones(len(table), dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self.state
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


class Several(BestWorst):
    most_pairs = 3


# --------------------------------------------------------------------- pairings


def test_a_pairing_defines_one_of_two_methods() -> None:
    class Neither(Pairing):
        def chose(self, rewards: Tensor, generator: torch.Generator) -> Any: ...

    for pairing in (Neither(), Pairing()):
        message = (
            f"data.pairing: {type(pairing).__name__} must define choose(rewards, generator), for one pair"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            iteration_rules(pairing=pairing)


def test_a_pairing_of_no_pairs_is_refused() -> None:
    pairing = Several()
    pairing.most_pairs = 0
    with pytest.raises(ValueError, match=r"data\.pairing: Several\.most_pairs=0 must be at least 1"):
        iteration_rules(pairing=pairing)


@pytest.mark.parametrize(
    ("pairing", "samples", "most"), [(BestWorst(), 4, 1), (Several(), 4, 3), (Several(), 2, 1)]
)
def test_most_pairs_of_a_prompt(pairing: Pairing, samples: int, most: int) -> None:
    """Two responses are one pair, whatever the rule might choose of more."""
    assert iteration_rules(pairing=pairing, samples_per_prompt=samples).most_pairs == most


def test_expected_pairs() -> None:
    """Half of 10 prompts, 3 pairs each, a fifth of which is kept."""
    ids = [f"p{number}" for number in range(10)]
    assert iteration_rules().expected_pairs(ids, 0, each=1) == (10, 5)
    assert iteration_rules().expected_pairs(ids, 0, each=3) == (10, 15)
    assert iteration_rules(pair_selection=Easiest(0.2)).expected_pairs(ids, 0, each=3) == (10, 3)


# ------------------------------------------------------------------- selections


def test_what_only_the_selection_of_prompts_has() -> None:
    class Reading(Counting):
        requires = ("history",)

    iteration_rules(selection=Reading())
    message = r"data\.pair_selection: Reading needs the column 'history', which is not there; this slot has difficulty"
    with pytest.raises(ValueError, match=message):
        iteration_rules(pair_selection=Reading())


# ----------------------------------------------------------------------- states


def test_states_come_back_whatever_happens_to_the_rule_and_to_them() -> None:
    found = iteration_rules(selection=Counting(), pair_selection=Counting())
    found.pair_selection.select(StatisticsTable((), {}), iteration=0, seed=0)
    states = found.state_dict()
    assert states == {
        "schedule": {},
        "selection": {"asked": 0},
        "pair_selection": {"asked": 1},
        "curriculum": {},
    }
    for _ in range(2):
        found.load_state_dict(states)
        found.pair_selection.select(StatisticsTable((), {}), iteration=0, seed=0)
        assert found.state_dict()["pair_selection"] == {"asked": 2}
    assert states["pair_selection"] == {"asked": 1}
    found.load_state_dict(found.fresh_states)
    assert found.state_dict() == found.fresh_states == {**states, "pair_selection": {"asked": 0}}


def test_a_state_of_fewer_rules_leaves_the_others_as_they_are() -> None:
    found = iteration_rules(selection=Counting({"asked": 7}))
    found.load_state_dict({"schedule": {}})
    assert found.state_dict()["selection"] == {"asked": 7}


@pytest.mark.parametrize("state", [{"mean": torch.zeros(1)}, {("a", 1): 0}])
def test_a_state_that_json_cannot_hold_is_refused_at_the_start(state: Any) -> None:
    message = (
        r"^data\.selection: Counting\.state_dict\(\) returned something that JSON cannot hold \(.+\): return"
    )
    with pytest.raises(UserError, match=message):
        iteration_rules(selection=Counting(state))


# ---------------------------------------------------------------------- feedback


@pytest.mark.parametrize(
    ("slot", "rule", "message"),
    [
        (
            "pair_selection",
            HighestPVar(0.5),
            "data.pair_selection: HighestPVar needs the column 'responses', which",
        ),
        (
            "pair_selection",
            PerCategory(HighestPVar(0.5)),
            "data.pair_selection: PerCategory needs the column 'responses', which is not there; this slot has diff",
        ),
    ],
)
def test_a_wrapped_rule_needs_its_columns_too(slot: str, rule: Selection, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        iteration_rules(**{slot: rule})


def test_a_schedule_needs_columns_that_are_there() -> None:
    class Wanting(CategoryBandit):
        requires = ("gap",)

    message = "data.schedule: Wanting needs the column 'gap', which is not there; this slot has difficulty"
    with pytest.raises(ValueError, match=re.escape(message)):
        iteration_rules(schedule=Wanting(0.5))


def test_every_rule_observes_and_its_metrics_go_by_the_slot() -> None:
    class Observing(Schedule):
        seen = -1

        def candidates(
            self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
        ) -> list[str]:
            return list(prompt_ids)

        def observe(self, table: StatisticsTable, *, iteration: int) -> None:
            self.seen = iteration

        def metrics(self) -> dict[str, float]:
            return {"seen": float(self.seen)}

    rules = iteration_rules(schedule=Observing())
    assert rules.observe(StatisticsTable((), {}), iteration=3) == {"iteration/schedule/seen": 3.0}
