"""Real runs that are killed, or asked to stop, at a point; the same command then gives the uninterrupted run.

Nothing that was finished is made twice: the shards of all attempts together are those of the uninterrupted run, each
written as often, and an optimizer step is repeated only if no checkpoint stands behind it.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.crash_runs import Crashes
from support.crashing import Change, Outcome
from support.same_run import leftovers

Point = tuple[str, int]  # a change, "what path" by a regular expression, and which of those: 0 is the first
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def crashes(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    found = Crashes(tiny_policy, tmp_path_factory.mktemp("crashes"))
    yield found
    found.server.close()


@pytest.fixture(autouse=True)
def fresh(crashes: Crashes) -> Iterator[None]:
    yield
    crashes.clear()


def check_going_on(crashes: Crashes, variant: str, ended: Sequence[Outcome]) -> None:
    """Give the command again, and find the uninterrupted run, with nothing made twice but what was in flight."""
    steps = sum(len(outcome.steps) for outcome in ended)
    ahead = steps - crashes.saved_step()
    gone_on = crashes.go_on(variant, ended)
    assert gone_on.differences == []
    assert gone_on.shards_twice == []
    assert len(gone_on.steps_twice) == ahead


def place(changes: Sequence[Change], point: Point) -> int:
    """Return the number of a change."""
    pattern, which = point
    found = [
        number
        for number, change in enumerate(changes)
        if re.fullmatch(pattern, f"{change.what} {change.final}")
    ]
    return found[which]


KILLS: dict[str, Point] = {
    "probing": ("reach probing/3", 1),
    "training": ("reach training/4", 1),  # in the middle of an optimizer step
    "checkpoint": ("rename checkpoints/last.ckpt", 3),
}
MORE_KILLS: dict[str, Point] = {
    "export": ("rename policy", 1),  # the old folder moved away, the new one not yet in its place
    "first evaluation": ("reach evaluating/3", 0),
    "generating": ("reach generating/8", 1),
    "generated": ("rename iterations/001/rollouts/topup-00001.parquet", 0),
    "scoring": ("rename iterations/001/rollouts/probe-00001.parquet", 1),
    "selection": ("rename iterations/001/difficulty.parquet", 0),
    "reference": ("reach reference/4", 1),
    "referenced": ("open iterations/001/pairs.parquet", 0),
    "pairs": ("rename iterations/000/pairs.parquet", 0),
    "manifest": ("rename iterations/001/manifest.json", 1),
    "complete": ("remove iterations/001/reference/.*", 0),
    "first step": ("reach step/0", 0),
    "metrics": ("open metrics.csv", 4),
    "trained": ("reach evaluating/0", 1),
    "evaluation": ("rename evaluations/002/rollouts.parquet", 0),
    "evaluated": ("remove evaluations/001/parts-.*", 1),
    "export begun": (r"open \.policy\.new/tokenizer_config.json", 1),
    "between iterations": ("mkdir iterations/001", 0),
    "end": ("rename checkpoints/last.ckpt", -1),
}


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, id=name) for name, point in KILLS.items()]
    + [pytest.param(point, id=name, marks=slow) for name, point in MORE_KILLS.items()],
)
def test_killed_and_gone_on_is_uninterrupted(crashes: Crashes, point: Point) -> None:
    _, whole = crashes.whole("plain")
    killed = crashes.run("plain", at=place(whole.changes, point))
    assert killed.status == -signal.SIGKILL
    assert len(killed.steps) - crashes.saved_step() in (0, 1)  # steps that are to be taken again
    check_going_on(crashes, "plain", [killed])


COMBINED = "adapter with dropout, two epochs, initial reference"


@slow
@pytest.mark.parametrize(
    ("variant", "point"),
    [
        (COMBINED, ("reach training/4", 0)),  # the second epoch of the first iteration
        ("adapter with dropout", ("reach training/4", 1)),
        ("two epochs", ("reach training/8", 1)),
        ("two epochs", ("rename checkpoints/last.ckpt", 2)),
        ("initial reference", ("reach training/5", 0)),
        ("initial reference", ("reach reference/6", 1)),
        ("optimizer carried on", ("reach training/4", 1)),
        ("nothing held out", ("rename checkpoints/last.ckpt", 2)),
        ("old iterations pruned", ("rename iterations/000/manifest.json", 2)),
        ("old iterations pruned", ("remove iterations/000/rollouts/.*", 2)),
        ("old iterations pruned", ("remove iterations/001/rollouts/.*", 4)),
    ],
)
def test_killed_with_other_settings(crashes: Crashes, variant: str, point: Point) -> None:
    _, whole = crashes.whole(variant)
    killed = crashes.run(variant, at=place(whole.changes, point))
    assert killed.status == -signal.SIGKILL
    check_going_on(crashes, variant, [killed])


@slow
def test_without_a_checkpoint_inside_the_iteration_its_steps_are_taken_again(crashes: Crashes) -> None:
    variant = "one checkpoint an iteration"
    _, whole = crashes.whole(variant)
    killed = crashes.run(variant, at=place(whole.changes, ("reach training/5", 1)))
    assert crashes.saved_step() == whole.steps.index(killed.steps[-1]) - 1 == 3
    check_going_on(crashes, variant, [killed])


@slow
def test_killed_twice(crashes: Crashes) -> None:
    _, whole = crashes.whole("plain")
    first = crashes.run("plain", at=place(whole.changes, MORE_KILLS["scoring"]))
    second = crashes.run("plain", at=place(first.changes, ("reach scoring/5", 0)))
    third = crashes.run("plain", at=20)
    assert {first.status, second.status, third.status} == {-signal.SIGKILL}
    check_going_on(crashes, "plain", [first, second, third])


@slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_killed_after_a_while(crashes: Crashes, share: float) -> None:
    """Also inside a write, which no change of the folder tells of."""
    _, whole = crashes.whole("plain")
    killed = crashes.run("plain", after=share * whole.seconds)
    if killed.status == 0:
        pytest.skip("the run was over before")
    assert killed.status == -signal.SIGKILL
    check_going_on(crashes, "plain", [killed])


# ------------------------------------------------------------------ asked to stop

STOPS: dict[str, Point] = {
    "training": ("reach training/4", 1),
    "evaluating": ("reach evaluating/3", 1),
    "probing": ("reach probing/8", 0),
    "generating": ("reach generating/8", 1),
    "scoring": ("reach scoring/5", 3),
    "reference": ("reach reference/4", 1),
    "checkpoint": ("rename checkpoints/last.ckpt", 1),
    "export": ("rename policy", 1),
}


@pytest.mark.parametrize(
    ("point", "by"),
    [pytest.param(STOPS["training"], signal.SIGTERM, id="training")]
    + [
        pytest.param(point, signal.SIGTERM, id=name, marks=slow)
        for name, point in STOPS.items()
        if name != "training"
    ]
    + [
        pytest.param(STOPS[name], signal.SIGINT, id=f"ctrl-c-{name}", marks=slow)
        for name in ("training", "probing")
    ],
)
def test_stopped_and_gone_on_is_uninterrupted(crashes: Crashes, point: Point, by: signal.Signals) -> None:
    _, whole = crashes.whole("plain")
    stopped = crashes.run("plain", at=place(whole.changes, point), by=by)
    assert stopped.status == 128 + by
    assert stopped.output.splitlines()[-1] == (
        f"sppo-lightning: stopped by {by.name}. What is finished is on disk: the same command resumes from there."
    )
    assert "Traceback" not in stopped.output
    assert crashes.saved_step() == len(stopped.steps)  # with the step that was under way
    assert leftovers(crashes.root) in ([], [".policy.new", ".policy.old"])
    check_going_on(crashes, "plain", [stopped])
