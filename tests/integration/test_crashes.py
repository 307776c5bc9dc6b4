"""Real runs that are killed, or asked to stop, at a point; the same command then gives the uninterrupted run.

Nothing that was finished is made twice: the shards of all attempts together are those of the uninterrupted run, each
written as often, and an optimizer step is repeated only if no checkpoint stands behind it.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli_arguments
from crashing import Change, Outcome, RunServer
from same_run import differences, leftovers

EVERY_STEP = 1e-9  # minutes between two checkpoints
LORA = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8, "model__policy__lora__dropout": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one checkpoint an iteration": {"minutes": 10},
    "two epochs": {"data__epochs_per_iteration": 2},
    "initial reference": {"model__reference": "initial"},
    "adapter with dropout": LORA,
    "adapter with dropout, two epochs, initial reference": {
        **LORA,
        "data__epochs_per_iteration": 2,
        "model__reference": "initial",
    },
    "optimizer carried on": {"model__carry_optimizer": "true"},
    "nothing held out": {"data__eval_prompts": None},
}
Point = tuple[str, int]  # a change, "what path" by a regular expression, and which of those: 0 is the first
slow = pytest.mark.slow


class Crashes:
    """Runs of a few variants: whole, ended by signals, and gone on."""

    def __init__(self, policy: Path, folder: Path) -> None:
        self.root = folder / "run"  # of all runs in turn, so that no path in a file tells them apart
        self._policy = policy
        self._folder = folder
        self._whole: dict[str, tuple[Path, Outcome]] = {}
        self.server = RunServer(folder / "output")
        for name, start, count in (("train", 0, 14), ("eval", 50, 6)):
            records = [{"id": f"{name}{n}", "prompt": f"Count to {start + n}"} for n in range(count)]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines)

    def whole(self, variant: str) -> tuple[Path, Outcome]:
        """Return the uninterrupted run."""
        if variant not in self._whole:
            outcome = self.run(variant)
            assert outcome.status == 0, outcome.output
            assert leftovers(self.root) == []
            kept = self._folder / f"whole-{len(self._whole)}"
            self.root.rename(kept)
            self._whole[variant] = kept, outcome
        return self._whole[variant]

    def run(self, variant: str, **end: Any) -> Outcome:
        """Give the command."""
        changes = dict(VARIANTS[variant])
        callbacks = [
            {"class_path": "sppo_lightning.callbacks.DifficultyReestimation"},
            {
                "class_path": "sppo_lightning.callbacks.RunCheckpoint",
                "init_args": {"every_n_minutes": changes.pop("minutes", EVERY_STEP)},
            },
            {"class_path": "crashing.Marks"},
        ]
        settings = {
            "data__eval_prompts": self._folder / "eval.jsonl",
            "trainer__callbacks": json.dumps(callbacks),
            **changes,
        }
        prompts = self._folder / "train.jsonl"
        return self.server.run(
            ["fit", *cli_arguments(self._policy, prompts, self.root, **settings)], self.root, **end
        )

    def saved_step(self) -> int:
        """Return how many optimizer steps are behind the checkpoint, 0 without one."""
        last = self.root / "checkpoints" / "last.ckpt"
        return int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else 0

    def go_on(self, variant: str, ended: Sequence[Outcome]) -> None:
        """Give the command again, and compare everything with the uninterrupted run."""
        kept, whole = self.whole(variant)
        step = self.saved_step()
        last = self.run(variant)
        assert last.status == 0, last.output
        assert differences(kept, self.root) == []
        assert leftovers(self.root) == []
        shards = Counter(path for outcome in (*ended, last) for path in outcome.shards)
        assert shards == Counter(whole.shards)
        assert last.steps == whole.steps[step:]


@pytest.fixture(scope="module")
def crashes(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    found = Crashes(tiny_policy, tmp_path_factory.mktemp("crashes"))
    yield found
    found.server.close()


@pytest.fixture(autouse=True)
def fresh(crashes: Crashes) -> Iterator[None]:
    yield
    shutil.rmtree(crashes.root, ignore_errors=True)


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
    "export": ("rename policy", 1),  # the old folder moved away, the new one not yet in its place
}
MORE_KILLS: dict[str, Point] = {
    "first evaluation": ("reach evaluating/3", 0),
    "generating": ("reach generating/8", 1),
    "generated": ("rename iterations/001/rollouts/topup-00001.parquet", 0),
    "scoring": ("rename iterations/001/rollouts/probe-00001.parquet", 1),
    "selection": ("rename iterations/001/difficulty.parquet", 0),
    "reference": ("reach reference/4", 1),
    "pairs": ("rename iterations/000/pairs.parquet", 0),
    "manifest": ("rename iterations/001/manifest.json", 1),
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
    crashes.go_on("plain", [killed])


COMBINED = "adapter with dropout, two epochs, initial reference"


@pytest.mark.parametrize(
    ("variant", "point"),
    [
        (COMBINED, ("reach training/4", 0)),  # the second epoch of the first iteration
        pytest.param("adapter with dropout", ("reach training/4", 1), marks=slow),
        pytest.param("two epochs", ("reach training/8", 1), marks=slow),
        pytest.param("two epochs", ("rename checkpoints/last.ckpt", 2), marks=slow),
        pytest.param("initial reference", ("reach training/5", 0), marks=slow),
        pytest.param("initial reference", ("reach reference/6", 1), marks=slow),
        pytest.param("optimizer carried on", ("reach training/4", 1), marks=slow),
        pytest.param("nothing held out", ("rename checkpoints/last.ckpt", 2), marks=slow),
    ],
)
def test_killed_with_other_settings(crashes: Crashes, variant: str, point: Point) -> None:
    _, whole = crashes.whole(variant)
    killed = crashes.run(variant, at=place(whole.changes, point))
    assert killed.status == -signal.SIGKILL
    crashes.go_on(variant, [killed])


@slow
def test_without_a_checkpoint_inside_the_iteration_its_steps_are_taken_again(crashes: Crashes) -> None:
    variant = "one checkpoint an iteration"
    _, whole = crashes.whole(variant)
    killed = crashes.run(variant, at=place(whole.changes, ("reach training/5", 1)))
    assert crashes.saved_step() == whole.steps.index(killed.steps[-1]) - 1 == 3
    crashes.go_on(variant, [killed])


@slow
def test_killed_twice(crashes: Crashes) -> None:
    _, whole = crashes.whole("plain")
    first = crashes.run("plain", at=place(whole.changes, MORE_KILLS["scoring"]))
    second = crashes.run("plain", at=place(first.changes, ("reach scoring/5", 0)))
    third = crashes.run("plain", at=20)
    assert {first.status, second.status, third.status} == {-signal.SIGKILL}
    crashes.go_on("plain", [first, second, third])


@slow
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_killed_after_a_while(crashes: Crashes, share: float) -> None:
    """Also inside a write, which no change of the folder tells of."""
    _, whole = crashes.whole("plain")
    killed = crashes.run("plain", after=share * whole.seconds)
    if killed.status == 0:
        pytest.skip("the run was over before")
    assert killed.status == -signal.SIGKILL
    crashes.go_on("plain", [killed])


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
        f"sppo-lightning: stopped by {by.name}. What is finished is on disk: the same command goes on from there."
    )
    assert "Traceback" not in stopped.output
    assert crashes.saved_step() == len(stopped.steps)  # with the step that was under way
    assert leftovers(crashes.root) in ([], [".policy.new", ".policy.old"])
    crashes.go_on("plain", [stopped])
