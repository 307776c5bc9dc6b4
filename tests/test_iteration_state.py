"""How far a run has come: entering, reopening, and what a checkpoint keeps; in a whole fit in integration/."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from sppo_lightning.difficulty import (
    Reestimation,
    empty_difficulty_table,
    estimate_difficulty,
    reward_statistics,
)
from sppo_lightning.iteration import IterationBuilder
from sppo_lightning.iteration_state import IterationState
from sppo_lightning.pairs import PairTable
from sppo_lightning.rollouts import IterationStore, RunFolder
from sppo_lightning.types import PreferencePair, Rollout, UserError

MANIFEST = {
    "policy_fingerprint": "first",
    "smoothing": 0.25,
    "dropped": {"too_long": 2},
    "metrics": {"a": 1.5},
}


def rollout(prompt_id: str, index: int, reward: float) -> Rollout:
    return Rollout(prompt_id, index, "say it", "well", (5, 1), "stop", reward)


class Building:
    """Stands where the builder is: writes an iteration with one pair, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self) -> IterationBuilder:
        return cast(IterationBuilder, self)

    def build(self, store: IterationStore, **asked: Any) -> None:
        self.asked.append(asked)
        pair = PreferencePair("a", (1,), (2,), (3,), "c", "r", 1.0, 0.0)
        store.write_pairs(PairTable.collect([pair]))
        store.shards.write("probe", 0, [rollout("a", 0, 1.0), rollout("a", 1, 2.0)])
        store.write_manifest(
            {**MANIFEST, "policy_fingerprint": asked["policy_fingerprint"], "complete": True}
        )


def test_an_iteration_is_made_once(tmp_path: Path) -> None:
    folder, build = RunFolder(tmp_path), Building()
    for state in (IterationState(), IterationState()):  # the second: started again before a checkpoint was
        assert (state.current, len(state.pairs)) == (-1, 0)
        state.enter(0, folder=folder, policy_fingerprint="first", builder=build)
        assert (state.current, state.pairs.prompt_ids) == (0, ["a"])
    assert len(build.asked) == 1
    assert build.asked[0]["previous"].prompt_ids == ()
    assert build.asked[0]["reestimation"] is None


def test_the_next_iteration_gets_what_is_known_and_due(tmp_path: Path) -> None:
    """Nothing was known of ``a``: its difficulty is the mean of 1 and 2. Then 0.25 * 1.5 + 0.75 * 1.5."""
    folder, build, state = RunFolder(tmp_path), Building(), IterationState()
    state.enter(0, folder=folder, policy_fingerprint="first", builder=build)
    state.due = Reestimation(("a",), 2, 0.25)
    state.enter(1, folder=folder, policy_fingerprint="second", builder=build)
    assert build.asked[1]["previous"]["difficulty"].tolist() == [1.5]
    assert build.asked[1]["reestimation"] == state.due
    assert state.difficulty_after(1, folder=folder)["estimated_iteration"].tolist() == [1.0]
    assert state.metrics(folder) == {"iteration/number": 1.0, "a": 1.5, "iteration/dropped/too_long": 2.0}


def test_another_policys_data_is_refused(tmp_path: Path) -> None:
    folder, build = RunFolder(tmp_path), Building()
    IterationState().enter(0, folder=folder, policy_fingerprint="first", builder=build)
    state = IterationState()
    with pytest.raises(
        UserError, match="was sampled from another policy than the one that enters iteration 0"
    ):
        state.enter(0, folder=folder, policy_fingerprint="other", builder=build)
    assert (state.current, len(build.asked)) == (-1, 1)


def test_a_finished_iteration_is_read_again_not_made(tmp_path: Path) -> None:
    folder, state = RunFolder(tmp_path), IterationState()
    with pytest.raises(UserError, match="is gone or incomplete although the checkpoint was trained on it"):
        state.reopen(0, folder=folder)
    Building().build(folder.iteration(0), policy_fingerprint="first")
    state.reopen(0, folder=folder)
    pairs = state.pairs
    assert pairs.prompt_ids == ["a"]
    state.reopen(0, folder=RunFolder(tmp_path / "gone"))
    assert state.pairs is pairs


@pytest.mark.parametrize("due", [None, Reestimation(("b", "a"), 3, 0.5)])
def test_a_checkpoint_keeps_the_state(tmp_path: Path, due: Reestimation | None) -> None:
    """The keys are those of checkpoints that were written before."""
    state, again = IterationState(), IterationState()
    state.current, state.due = 4, due
    state.known = estimate_difficulty(
        reward_statistics({"a": [1.0, 2.0], "b": [0.5]}), empty_difficulty_table(), iteration=3, smoothing=0.0
    )
    path = tmp_path / "state.pt"
    torch.save(state.state_dict(finished=5), path)
    kept = torch.load(path, weights_only=True)
    assert set(kept) == {"iteration", "finished", "table", "reestimation"}
    again.load_state_dict(kept)
    assert (again.current, again.finished, again.due) == (4, 5, due)
    assert again.known.prompt_ids == state.known.prompt_ids
    assert all(torch.equal(again.known[name], state.known[name]) for name in state.known.columns)
