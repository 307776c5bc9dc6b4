"""Held-out evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fakes import Alone, Digits, Echo, Threads, Unsampled, collector, encoded, same, together

from sppo_lightning.evaluation.held_out import BATCH, EvaluationLoader, HeldOut
from sppo_lightning.evaluation.measures import EvaluationBatch, measure, paired_difference
from sppo_lightning.evaluation.results import held_out_results
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Rollout, UserError

NAN, INF = math.nan, math.inf


def rows_of(*rewards: float | None, first: int = 0) -> list[Rollout]:
    """Response i has i + 1 tokens."""
    return [
        Rollout(f"p{number}", 0, "", "", (7,) * (number - first + 1), "stop", reward)
        for number, reward in enumerate(rewards, start=first)
    ]


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


# ------------------------------------------------------------------ measurements


def test_measure_golden() -> None:
    """Above, equal, below; a failed answer and one whose baseline failed have no win."""
    found = measure(rows_of(2.0, 1.0, 0.5, NAN, 3.0, INF), rows_of(1.0, 1.0, 1.0, 1.0, NAN, 1.0))
    close(found.reward, [2.0, 1.0, 0.5, NAN, 3.0, INF])
    close(found.win, [1.0, 0.5, 0.0, NAN, NAN, NAN])
    close(found.length, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    close(found.failed, [0.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert all(column.dtype == torch.float32 for column in found)


def test_measure_without_a_baseline_or_with_one_of_other_prompts() -> None:
    close(measure(rows_of(2.0, 1.0), None).win, [NAN, NAN])
    close(measure(rows_of(2.0, 1.0), rows_of(1.0, 1.0, first=1)).win, [NAN, 0.5])


def test_measure_compares_by_prompt_and_not_by_place() -> None:
    close(measure(rows_of(2.0, 1.0), rows_of(3.0, 0.0)[::-1]).win, [0.0, 1.0])


@pytest.mark.parametrize("rewards", [(), (NAN, INF), (None,)])
def test_no_finite_reward_at_all(rewards: tuple[float | None, ...]) -> None:
    message = r"^no held-out answer has a finite reward: check data\.reward on data\.eval_prompts$"
    with pytest.raises(UserError, match=message):
        measure(rows_of(*rewards), None)


def test_paired_difference_golden() -> None:
    """Differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3)."""
    found = paired_difference(rows_of(2.0, 4.0, 9.0), rows_of(1.0, 2.0, 3.0))
    assert found == pytest.approx((3.0, math.sqrt(7 / 3), 3))


def test_paired_difference_leaves_out_prompts_without_two_finite_rewards() -> None:
    """Left are p0 (difference 1) and p5 (difference 3): mean 2, standard error sqrt(2) / sqrt(2)."""
    rows = rows_of(2.0, NAN, 5.0, None, 5.0, 5.0, 5.0)
    baseline = rows_of(1.0, 2.0, -INF, 2.0, None, 2.0)[::-1]
    assert paired_difference(rows, baseline) == pytest.approx((2.0, 1.0, 2))


def test_paired_difference_of_few() -> None:
    one = paired_difference(rows_of(2.0), rows_of(0.5))
    assert (one.mean, one.prompts) == (1.5, 1)
    assert math.isnan(one.stderr)
    none = paired_difference(rows_of(2.0), rows_of(0.5, first=1))
    assert none.prompts == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.stderr)


# ------------------------------------------------------------------ stored answers


@dataclass(frozen=True)
class Snapshot(Unsampled):
    """Its level is what there is of its weights; the engine reads it."""

    level: int

    def fingerprint(self) -> str:
        return f"fingerprint of level {self.level}"


@dataclass
class Policy:
    """Starts from level 0."""

    level: int = 0
    swaps: int = 0

    def current(self) -> Any:
        return Snapshot(self.level)

    @contextmanager
    def initial(self) -> Iterator[Any]:
        self.swaps += 1
        yield Snapshot(0)


FIRST: Any = Snapshot(0)
FOURTH: Any = Snapshot(4)


class Levels(Digits):
    """Rewards the level that answered, less one for the prompt p1."""

    def score(self, prompts: Any, responses: Any) -> list[float]:
        super().score(prompts, responses)
        levels = [float(response.split()[1]) for response in responses]
        return [level - (prompt.id == "p1") for prompt, level in zip(prompts, levels, strict=True)]


@dataclass
class Run:
    root: Path
    policy: Policy
    engine: Echo
    reward: Digits
    rewarded_by: str = "levels"
    described_as: str = "rewards.Levels"
    replace_others: bool = True

    def held_out(self, count: int = 3, prefix: str = "", **settings: Any) -> HeldOut:
        return HeldOut(
            RunFolder(self.root),
            prefix,
            encoded(count),
            collector(self.engine, self.reward, **settings),
            self.policy,
            provenance={"reward": self.rewarded_by},
            legacy_provenance={"reward": self.described_as},
            replace_others=self.replace_others,
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, Policy(), Echo(), Levels())


def test_answers_are_stored_with_what_made_them(run: Run) -> None:
    rows = run.held_out().answer(2, FIRST)
    assert [row.reward for row in rows] == [0.0, -1.0, 0.0]
    place = run.root / "evaluations/002"
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "rollouts.parquet"]
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest.keys() == {"format", "policy_fingerprint", "asked", "digest"}
    assert manifest["policy_fingerprint"] == "fingerprint of level 0"
    assert load_evaluation(place) == rows
    assert load_evaluation(run.root / "evaluations/003") is None


def test_a_policy_answers_once(run: Run) -> None:
    rows = run.held_out().answer(1, FIRST)
    assert run.held_out().answer(1, FIRST) == rows
    assert (run.engine.calls, run.reward.calls) == (2, 2)  # two shards, once


def test_another_policy_is_answered_anew_and_other_prompts_are_refused(run: Run) -> None:
    run.held_out().answer(1, FIRST)
    again = run.held_out().answer(1, FOURTH)
    assert [row.reward for row in again] == [4.0, 3.0, 4.0]
    assert load_evaluation(run.root / "evaluations/001") == again
    with pytest.raises(
        UserError, match=r"001 holds answers to other prompts, or from another data\.generator"
    ):
        run.held_out(count=4).answer(1, FOURTH)
    run.rewarded_by = "something else"
    with pytest.raises(UserError, match=r"or from another data\.generator or data\.reward: use another"):
        run.held_out().answer(1, FOURTH)


def without_a_format(run: Run, number: int) -> Path:
    """Give an evaluation the manifest that it would have had before there was a format number, and return it."""
    path = run.root / f"evaluations/{number:03d}/manifest.json"
    asked = [
        [[item.prompt.id, item.token_ids, item.prompt.answer] for item in encoded(3)],
        {"reward": run.described_as},
    ]
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()
    fingerprint = json.loads(path.read_text())["policy_fingerprint"]
    path.write_text(json.dumps({"policy_fingerprint": fingerprint, "asked": digest}))
    return path


def test_answers_without_a_format_number_are_accepted(run: Run) -> None:
    run.held_out().measure(0)
    run.policy.level = 2
    expected = run.held_out().measure(1)
    manifests = [without_a_format(run, number) for number in (0, 1)]
    before = [path.read_text() for path in manifests]
    calls = run.engine.calls
    run.replace_others = False
    again = run.held_out().measure(1)
    assert [column.tolist() for column in again] == [column.tolist() for column in expected]
    assert run.engine.calls == calls
    assert [path.read_text() for path in manifests] == before


def test_answers_without_a_format_number_to_another_reward_are_refused(run: Run) -> None:
    run.held_out().answer(1, FIRST)
    without_a_format(run, 1)
    run.described_as = "rewards.Others"
    with pytest.raises(UserError, match=r"or from another data\.generator or data\.reward: use another"):
        run.held_out().answer(1, FIRST)


def test_a_legacy_digest_counts_without_a_format_number_alone(run: Run) -> None:
    run.held_out().answer(1, FIRST)
    path = without_a_format(run, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(UserError, match=r"or from another data\.generator or data\.reward: use another"):
        run.held_out().answer(1, FIRST)


def test_another_policy_overwrites_nothing_unless_told(run: Run) -> None:
    """`validate` on an exported policy, in the run's own folder, must leave the initial policy's answers."""
    rows = run.held_out().answer(0, FIRST)
    run.replace_others = False
    run.policy.level = 4
    with pytest.raises(
        UserError, match=r"000 holds the answers of another policy: name this one's checkpoint"
    ):
        run.held_out().measure(0)
    assert load_evaluation(run.root / "evaluations/000") == rows


def harm(path: Path) -> bytes:
    content = path.read_bytes()
    harmed = content.replace(b"fingerprint", b"fingerprinu") if path.suffix == ".json" else content[:-9]
    assert harmed != content
    path.write_bytes(harmed)
    return harmed


@pytest.mark.parametrize("fitting", [True, False])
@pytest.mark.parametrize("name", ["manifest.json", "rollouts.parquet"])
def test_damaged_answers_are_kept_aside_and_given_again(
    run: Run, name: str, fitting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The present policy's by itself, the initial policy's by a stand-in; a win is against both as they were."""
    run.replace_others = fitting
    run.held_out().measure(0)
    run.policy.level = 2
    expected = run.held_out().measure(1)
    for number in ("000", "001"):
        path = run.root / "evaluations" / number / name
        harmed = harm(path)
        again = run.held_out().measure(1)
        assert [column.tolist() for column in again] == [column.tolist() for column in expected]
        assert path.with_name(f"{name}.damaged").read_bytes() == harmed
        assert caplog.messages[-1] == f"{path} is damaged: it is kept as {name}.damaged and made anew"
    calls = run.engine.calls
    run.held_out().measure(1)
    assert run.engine.calls == calls


def test_another_policy_makes_no_damaged_answers_again_unless_told(run: Run) -> None:
    run.held_out().answer(0, FIRST)
    path = run.root / "evaluations/000/rollouts.parquet"
    path.unlink()
    run.replace_others = False
    with pytest.raises(UserError, match=r"000 holds the answers of another policy"):
        run.held_out().answer(0, FOURTH)
    assert len(run.held_out().answer(0, FIRST)) == 3


def test_a_damaged_evaluation_is_left_out_of_a_summary(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.held_out().measure(0)
    run.policy.level = 2
    run.held_out().measure(1)
    harm(run.root / "evaluations/001/rollouts.parquet")
    assert [result.finished for result in held_out_results(RunFolder(run.root), 1)] == [0]
    assert caplog.messages[-1].endswith("Its numbers are left out")


def test_sets_of_prompts_do_not_share_a_folder(run: Run) -> None:
    run.held_out().answer(1, FIRST)
    run.held_out(count=5, prefix="test-").answer(1, FIRST)
    found = {path.name: len(load_evaluation(path) or ()) for path in (run.root / "evaluations").iterdir()}
    assert found == {"001": 3, "test-001": 5}


def test_an_evaluation_that_broke_down_goes_on_where_it_stopped(run: Run) -> None:
    run.engine.fail_at = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        run.held_out(count=5).answer(1, FIRST)
    assert load_evaluation(run.root / "evaluations/001") is None
    rows = run.held_out(count=5).answer(1, FIRST)
    assert [row.prompt_id for row in rows] == [f"p{number}" for number in range(5)]
    assert [request.token_ids[0] for request in run.engine.asked] == [0, 1, 2, 3, 4]


def test_the_initial_policy_ties_with_itself(run: Run) -> None:
    found = run.held_out().measure(0)
    close(found.reward, [0.0, -1.0, 0.0])
    close(found.win, [0.5, 0.5, 0.5])
    assert run.policy.swaps == 0


def test_a_later_policy_is_measured_against_the_initial_one(run: Run) -> None:
    run.held_out().measure(0)
    run.policy.level = 2
    found = run.held_out().measure(1)
    close(found.reward, [2.0, 1.0, 2.0])
    close(found.win, [1.0, 1.0, 1.0])
    assert run.policy.swaps == 0


def test_an_initial_policy_that_never_answered_does_so_when_it_is_needed(run: Run) -> None:
    """As in `validate` on a checkpoint, in a fresh folder."""
    run.policy.level = 2
    found = run.held_out().measure(3)
    close(found.win, [1.0, 1.0, 1.0])
    assert (run.policy.swaps, run.policy.level) == (1, 2)
    assert sorted(path.name for path in (run.root / "evaluations").iterdir()) == ["000", "003"]
    initial = load_evaluation(run.root / "evaluations/000")
    assert initial is not None
    assert [row.reward for row in initial] == [0.0, -1.0, 0.0]


def test_two_ranks_evaluate_like_one(run: Run, tmp_path: Path) -> None:
    expected = run.held_out(count=7).measure(1)
    other = Run(tmp_path / "shared", Policy(), Echo(), Levels())
    meeting = threading.Barrier(2)
    found: dict[int, EvaluationBatch] = {}

    def evaluate(rank: int) -> None:
        mine = Run(other.root, Policy(), Echo(), Levels())
        found[rank] = mine.held_out(count=7, ranks=Threads(rank, 2, meeting)).measure(1)

    together(evaluate, 2)
    for rank in (0, 1):
        for ours, theirs in zip(found[rank], expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    place = "evaluations/001"
    assert same(load_evaluation(other.root / place) or [], load_evaluation(run.root / place) or [])
    assert not list((other.root / place).glob("parts-*"))


# ------------------------------------------------------------------------- loader


def measured(count: int) -> EvaluationBatch:
    numbers = torch.arange(float(count))
    return EvaluationBatch(numbers, numbers / 2, numbers + 1, numbers * 0)


def test_the_loader_measures_when_it_is_read() -> None:
    made: list[int] = []

    def make() -> EvaluationBatch:
        made.append(1)
        return measured(3)

    loader = EvaluationLoader(make, 3, Alone())
    assert len(loader) == 1
    assert made == []
    (batch,) = loader
    assert made == [1]
    for column, expected in zip(batch, measured(3), strict=True):
        torch.testing.assert_close(column, expected)
    list(loader)
    assert made == [1, 1]  # again after another iteration


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (BATCH, 1), (BATCH + 1, 2), (3 * BATCH, 3)])
def test_the_loader_yields_every_answer_once(count: int, batches: int) -> None:
    loader = EvaluationLoader(lambda: measured(count), count, Alone())
    found = list(loader)
    assert len(loader) == len(found) == batches
    assert torch.cat([batch.reward for batch in found]).tolist() == list(range(count))


@pytest.mark.parametrize(("count", "world_size"), [(7, 2), (2, 4), (2 * BATCH + 1, 2), (1, 3)])
def test_ranks_share_the_answers_and_all_of_them_take_part(count: int, world_size: int) -> None:
    """A rank without a share is asked for a batch too: the others wait for it while the answers are made."""
    made: list[int] = []
    rewards: list[float] = []
    for rank in range(world_size):

        def make(rank: int = rank) -> EvaluationBatch:
            made.append(rank)
            return measured(count)

        loader = EvaluationLoader(make, count, Alone(rank, world_size))
        found = list(loader)
        assert len(loader) == len(found) >= 1
        rewards += [value for batch in found for value in batch.reward.tolist()]
    assert made == list(range(world_size))
    assert sorted(rewards) == list(range(count))
