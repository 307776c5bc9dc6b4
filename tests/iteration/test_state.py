"""How far a run has come: entering, reopening, and what a checkpoint keeps; in a whole fit in integration/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.rules import iteration_rules
from torch import Tensor

from sppo_lightning.difficulty import (
    Reestimation,
    StatisticsTable,
    empty_difficulty_table,
    estimate_difficulty,
    reward_statistics,
)
from sppo_lightning.iteration.builder import IterationBuilder
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.iteration.state import IterationState
from sppo_lightning.selection import AllPairs, Curriculum, Easiest, RandomOrder
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.rendezvous import FileRanks
from sppo_lightning.training.batching import MicroBatch
from sppo_lightning.types import PreferencePair, Rollout, UserError

MANIFEST = {
    "policy_fingerprint": "first",
    "smoothing": 0.25,
    "dropped": {"too_long": 2},
    "metrics": {"a": 1.5},
}


ROWS = 9  # embeddings of the policy
RULES = iteration_rules(iterations=3, samples_per_prompt=2, selection=Easiest(1.0))
ALONE = FileRanks(Path(), rank=0, world_size=1)


def state_of(folder: RunFolder, rules: IterationRules = RULES) -> IterationState:
    return IterationState(folder, rules, epochs=2, ranks=ALONE)


def rollout(prompt_id: str, index: int, reward: float) -> Rollout:
    return Rollout(prompt_id, index, "say it", "well", (5, 1), "stop", reward)


class Keeping:
    """What a rule keeps: how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


class Turning(Keeping, Curriculum):
    """Begins one pair later each time that it is asked."""

    calls = 0

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        self.asked += 1
        self.calls += 1
        return torch.arange(len(keys)).roll(-self.asked)


class CountingAll(Keeping, AllPairs):
    """Keeps every row."""

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        self.asked += 1
        return super().select(table, iteration=iteration, seed=seed)


def keeping_rules() -> IterationRules:
    return replace(RULES, selection=CountingAll(), curriculum=Turning())


class Building:
    """Stands where the builder is: writes an iteration with few pairs, and remembers what it was asked for."""

    def __init__(self, prompts: str = "a", rules: IterationRules = RULES, *, old: bool = False) -> None:
        self.prompts = prompts
        self.rules = rules
        self.old = old  # whether it writes a manifest as it was before rules had a state
        self.asked: list[dict[str, Any]] = []

    def __call__(self) -> IterationBuilder:
        return cast(IterationBuilder, self)

    def build(self, store: IterationStore, **asked: Any) -> None:
        self.asked.append(asked)
        store.write_pairs(
            PairTable.collect(
                PreferencePair(name, (1,), (2,), (3,), "c", "r", 1.0, 0.0) for name in self.prompts
            )
        )
        rows = [rollout(name, index, 1.0 + index) for name in self.prompts for index in range(2)]
        store.shards.write("probe", 0, rows)
        table = estimate_difficulty(
            reward_statistics({name: [1.0, 2.0] for name in self.prompts}),
            empty_difficulty_table(),
            iteration=0,
            smoothing=0.0,
        )
        self.rules.selection.select(table, iteration=0, seed=0)
        store.write_difficulty(table, set(self.prompts))
        store.write_manifest(
            {
                **MANIFEST,
                **({} if self.old else {"rule_states": self.rules.state_dict()}),
                "iteration": asked.get("iteration", 0),
                "policy_fingerprint": asked["policy_fingerprint"],
                "counts": {"pairs": len(self.prompts)},
                "responses": {"sampled": len(rows)},
                "complete": True,
            }
        )


def test_an_iteration_is_made_once(tmp_path: Path) -> None:
    folder, build = RunFolder(tmp_path), Building()
    for state in (state_of(folder), state_of(folder)):  # the second: started again before a checkpoint was
        assert (state.current, len(state.pairs)) == (-1, 0)
        state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=build, global_step=0)
        assert (state.current, state.pairs.prompt_ids) == (0, ["a"])
    assert len(build.asked) == 1
    assert build.asked[0]["previous"].prompt_ids == ()
    assert build.asked[0]["reestimation"] is None


def test_the_next_iteration_gets_what_is_known_and_due(tmp_path: Path) -> None:
    """Nothing was known of ``a``: its difficulty is the mean of 1 and 2. Then 0.25 * 1.5 + 0.75 * 1.5."""
    folder, build = RunFolder(tmp_path), Building()
    state = state_of(folder)
    state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=build, global_step=0)
    state.due = Reestimation(("a",), 2, 0.25)
    state.enter(1, policy_fingerprint="second", embedding_rows=ROWS, builder=build, global_step=0)
    assert build.asked[1]["previous"]["difficulty"].tolist() == [1.5]
    assert [store.folder.name for store in build.asked[1]["earlier"]] == ["000"]
    assert build.asked[1]["reestimation"] == state.due
    assert state.difficulty_after(1)["estimated_iteration"].tolist() == [1.0]
    assert state.metrics() == {"iteration/number": 1.0, "a": 1.5, "iteration/dropped/too_long": 2.0}


def test_another_policys_data_is_refused(tmp_path: Path) -> None:
    folder, build = RunFolder(tmp_path), Building()
    state_of(folder).enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=build, global_step=0)
    state = state_of(folder)
    with pytest.raises(
        UserError, match="was sampled from another policy than the one that enters iteration 0"
    ):
        state.enter(0, policy_fingerprint="other", embedding_rows=ROWS, builder=build, global_step=0)
    assert (state.current, len(build.asked)) == (-1, 1)


def test_an_iteration_that_was_trained_on_is_read_again_not_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    state = state_of(folder)
    state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=Building("ab"), global_step=0)
    again = state_of(folder)
    again.load_state_dict(state.state_dict(finished=0, global_step=1))
    again.reopen(embedding_rows=ROWS)
    pairs = again.pairs
    assert pairs.prompt_ids == ["a", "b"]
    again.folder = RunFolder(tmp_path / "gone")
    again.reopen(embedding_rows=ROWS)
    assert again.pairs is pairs


def test_an_iteration_that_was_trained_on_and_is_gone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    state = state_of(folder)
    state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=Building(), global_step=0)
    again = state_of(RunFolder(tmp_path / "gone"))
    again.load_state_dict(state.state_dict(finished=0, global_step=1))
    with pytest.raises(
        UserError, match=r"iterations/000 is gone or incomplete although the checkpoint was trained on it"
    ):
        again.reopen(embedding_rows=ROWS)


def test_an_iteration_that_was_trained_on_and_is_another_now(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    state = state_of(folder)
    state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=Building(), global_step=0)
    again = state_of(folder)
    again.load_state_dict(state.state_dict(finished=0, global_step=1))
    Building().build(folder.iteration(0), policy_fingerprint="other")
    with pytest.raises(UserError, match=r"iterations/000 was made from other weights than the data that"):
        again.reopen(embedding_rows=ROWS)


@pytest.mark.parametrize("due", [None, Reestimation(("b", "a"), 3, 0.5)])
def test_a_checkpoint_keeps_the_state(tmp_path: Path, due: Reestimation | None) -> None:
    """The keys are those of checkpoints that were written before."""
    state, again = (state_of(RunFolder(tmp_path)) for _ in range(2))
    state.current, state.due = 4, due
    state.known = estimate_difficulty(
        reward_statistics({"a": [1.0, 2.0], "b": [0.5]}), empty_difficulty_table(), iteration=3, smoothing=0.0
    )
    path = tmp_path / "state.pt"
    torch.save(state.state_dict(finished=5, global_step=0), path)
    kept = torch.load(path, weights_only=True)
    before = {"iteration", "finished", "pairs_consumed", "made_from", "table", "reestimation"}
    assert set(kept) == before | {"rule_states", "reverted"}
    again.load_state_dict(kept)
    assert (again.current, again.finished, again.due) == (4, 5, due)
    assert again.known.prompt_ids == state.known.prompt_ids
    assert all(torch.equal(again.known[name], state.known[name]) for name in state.known.columns)


# ------------------------------------------------- going on inside an iteration


def trained(
    folder: RunFolder, *, steps: int, before: int = 10, finished: int = 0
) -> tuple[IterationState, int | None]:
    """Return the state after a resume ``steps`` behind the start of iteration 0, and the epoch that it goes on in.

    Five pairs, two a step, two epochs: three steps an epoch, of 2, 2 and 1 pairs.
    """
    state, again = state_of(folder), state_of(folder)
    state.enter(
        0, policy_fingerprint="first", embedding_rows=ROWS, builder=Building("abcde"), global_step=before
    )
    again.load_state_dict(state.state_dict(finished=finished, global_step=before + steps))
    return again, again.resume(before + steps, embedding_rows=ROWS)


@pytest.mark.parametrize(
    ("steps", "finished", "consumed", "epoch"),
    [
        (0, 0, 0, 0),
        (1, 0, 2, 0),
        (2, 0, 4, 0),
        (3, 0, 5, 1),  # the first epoch is over
        (4, 0, 7, 1),
        (6, 0, 10, 1),  # trained, its end still to come
        (6, 1, 10, 2),
    ],
)
def test_a_checkpoint_tells_where_it_goes_on(
    tmp_path: Path, steps: int, finished: int, consumed: int, epoch: int
) -> None:
    folder = RunFolder(tmp_path)
    state, goes_on_in = trained(folder, steps=steps, finished=finished)
    assert goes_on_in == epoch
    assert state.steps_taken(10 + steps) == steps
    assert state.state_dict(finished=0, global_step=10 + steps)["pairs_consumed"] == consumed
    assert state.resume(10 + steps, embedding_rows=ROWS) is None


def test_without_a_checkpoint_there_is_nothing_to_go_on_in(tmp_path: Path) -> None:
    state = state_of(RunFolder(tmp_path))
    assert state.resume(0, embedding_rows=ROWS) is None
    state.load_state_dict(state.state_dict(finished=0, global_step=0))  # before any data was made
    assert state.resume(0, embedding_rows=ROWS) is None


@pytest.mark.parametrize("steps", range(7))
def test_what_is_left_of_an_epoch_is_the_rest_of_its_order(tmp_path: Path, steps: int) -> None:
    folder = RunFolder(tmp_path)
    whole, _ = trained(folder, steps=0)
    state, goes_on_in = trained(folder, steps=steps)
    assert goes_on_in is not None

    def passes(of: IterationState, taken: int) -> list[MicroBatch]:
        found = of.steps(goes_on_in, global_step=10 + taken)
        return [micro for micro in found if micro is not None]

    left = [micro for micro in passes(whole, 3 * goes_on_in) if micro.slot.step >= steps]
    assert passes(state, steps) == left
    assert len(left) == [5, 3, 1, 5, 3, 1, 0][steps]


# ------------------------------------------------- a set number of optimizer steps


def entered(folder: RunFolder, *, steps: int | None, curriculum: Curriculum, seed: int = 0) -> IterationState:
    """Return a state with five pairs, two a step, one epoch of so many steps."""
    rules = replace(RULES, steps_per_iteration=steps, curriculum=curriculum, seed=seed)
    state = IterationState(folder, rules, epochs=1, ranks=ALONE)
    build = Building("abcde")
    state.enter(0, policy_fingerprint="first", embedding_rows=ROWS, builder=build, global_step=0)
    return state


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_pairs_are_passed_over_until_the_steps_are_taken(tmp_path: Path, steps: int) -> None:
    order = entered(RunFolder(tmp_path), steps=steps, curriculum=RandomOrder()).steps(0, global_step=0).order
    passes = [order[start : start + 5] for start in range(0, len(order), 5)]
    assert len(order) == 2 * steps
    assert all(len(set(each)) == len(each) for each in passes)
    assert all(sorted(each) == list(range(5)) for each in passes[:-1])
    assert len({tuple(each) for each in passes}) == len(passes)


def test_as_many_steps_as_there_are_pairs_are_an_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    plain, matched = (
        entered(folder, steps=steps, curriculum=RandomOrder()).steps(0, global_step=0).order
        for steps in (None, 5)
    )
    assert matched[:5] == plain


def test_a_pass_that_is_not_whole_keeps_the_curriculum_and_leaves_out_random_pairs(tmp_path: Path) -> None:
    class ByRow(Curriculum):
        def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
            return torch.arange(len(keys))

    orders = []
    for seed in range(5):
        state = entered(RunFolder(tmp_path / str(seed)), steps=2, curriculum=ByRow(), seed=seed)
        orders.append(state.steps(0, global_step=0).order)
    assert all(order == sorted(order) and len(order) == 4 for order in orders)
    assert len(set(map(tuple, orders))) > 1


@pytest.mark.parametrize("taken", range(5))
def test_a_run_with_a_set_number_of_steps_is_resumed_in_any_of_them(tmp_path: Path, taken: int) -> None:
    folder = RunFolder(tmp_path)
    state = entered(folder, steps=4, curriculum=RandomOrder())
    again = IterationState(folder, state.rules, epochs=1, ranks=ALONE)
    again.load_state_dict(state.state_dict(finished=0, global_step=taken))
    assert again.resume(taken, embedding_rows=ROWS) == 0
    assert again.steps_taken(taken) == taken
    assert again.is_trained(taken) == (taken == 4)
    whole = [micro for micro in state.steps(0, global_step=0) if micro is not None]
    left = [micro for micro in again.steps(0, global_step=taken) if micro is not None]
    assert left == [micro for micro in whole if micro.slot.step >= taken]
    assert {micro.slot.steps for micro in whole} == {4}


# -------------------------------------------------------------- what rules keep


def in_order(state: IterationState, epoch: int) -> str:
    """The prompts of an epoch's pairs, in training order."""
    steps = state.steps(epoch, global_step=epoch * 3)  # of two pairs
    return "".join(state.pairs.prompt_ids[row] for row in steps.order)


def enter(state: IterationState, iteration: int, *, old: bool = False) -> None:
    state.enter(
        iteration,
        policy_fingerprint="first",
        embedding_rows=ROWS,
        builder=Building("abcde", state.rules, old=old),
        global_step=0,
    )


def saved(state: IterationState) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps({"rule_states": state.state_dict(finished=0, global_step=0)["rule_states"]})
    )
    return found


def resumed(state: IterationState) -> IterationState:
    """Return the state of another process, of whose rules it is not known what they have seen."""
    again = state_of(state.folder, state.rules)
    again.load_state_dict(state.state_dict(finished=0, global_step=0))
    again.resume(0, embedding_rows=ROWS)
    state.rules.load_state_dict({"selection": {"asked": 77}, "curriculum": {"asked": 77}})
    return again


ORDERS = [["bcdea", "cdeab"], ["deabc", "eabcd"]]  # of a curriculum that was asked once to four times


def test_a_curriculum_is_asked_once_for_each_epoch(tmp_path: Path) -> None:
    folder, rules = RunFolder(tmp_path), keeping_rules()
    state = state_of(folder, rules)
    for iteration in range(2):
        enter(state, iteration)
        for epoch in (0, 0, 1, 1):  # Lightning asks for a finished epoch again
            assert in_order(state, epoch) == ORDERS[iteration][epoch]
    assert isinstance(rules.curriculum, Turning)
    assert rules.curriculum.calls == 4
    states = [(folder.iteration(number).read_manifest() or {})["rule_states"] for number in range(2)]
    assert [one["selection"] for one in states] == [{"asked": 1}, {"asked": 2}]
    assert [one["curriculum"] for one in states] == [{"asked": 0}, {"asked": 2}]
    assert saved(state)["rule_states"]["curriculum"] == {"asked": 4}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_epoch_has_the_same_order(tmp_path: Path, epoch: int) -> None:
    folder, rules = RunFolder(tmp_path), keeping_rules()
    state = state_of(folder, rules)
    enter(state, 0)
    in_order(state, 0)
    again = resumed(state)
    assert in_order(again, epoch) == ORDERS[0][epoch]
    assert saved(again) == saved(state)


@pytest.mark.parametrize("stored", [False, True])
def test_the_next_iteration_goes_on_from_what_the_checkpoint_holds(tmp_path: Path, stored: bool) -> None:
    """Whether its data was made before the run ended or is made after, also where part of it was made."""
    folder, rules = RunFolder(tmp_path), keeping_rules()
    state = state_of(folder, rules)
    enter(state, 0)
    in_order(state, 0)
    again = resumed(state)
    if stored:
        enter(state, 1)
        rules.load_state_dict({"selection": {"asked": 99}, "curriculum": {"asked": 99}})
    enter(again, 1)
    assert [in_order(again, epoch) for epoch in range(2)] == ORDERS[1]
    assert saved(again)["rule_states"]["selection"] == {"asked": 2}


def test_a_run_that_starts_in_the_same_process_starts_with_fresh_rules(tmp_path: Path) -> None:
    rules = keeping_rules()
    for name in ("one", "other"):
        folder = RunFolder(tmp_path / name)
        state = state_of(folder, rules)
        enter(state, 0)
        assert in_order(state, 0) == ORDERS[0][0]
        assert saved(state)["rule_states"]["selection"] == {"asked": 1}


def test_runs_of_before_rules_had_a_state_are_resumed(tmp_path: Path) -> None:
    """Neither their manifests nor their checkpoints say anything: rules start afresh."""
    folder, rules = RunFolder(tmp_path), keeping_rules()
    state = state_of(folder, rules)
    enter(state, 0, old=True)
    kept = state.state_dict(finished=0, global_step=0)
    del kept["rule_states"]
    again = state_of(folder, rules)
    again.load_state_dict(kept)
    again.resume(0, embedding_rows=ROWS)
    assert in_order(again, 0) == ORDERS[0][0]
    enter(again, 1)
    assert in_order(again, 0) == ORDERS[1][0]
