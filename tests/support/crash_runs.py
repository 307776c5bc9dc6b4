"""Whole runs of a few kinds, ended ones, and what comes of the same command given again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.crashing import Outcome, RunServer
from support.runs import cli_arguments
from support.same_run import differences, leftovers

EVERY_STEP = 1e-9  # minutes between two checkpoints
LORA = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8, "model__policy__lora__dropout": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one checkpoint an iteration": {"minutes": 10},
    "two epochs": {"data__epochs_per_iteration": 2},
    "a set number of steps": {"data__steps_per_iteration": 5},
    "initial reference": {"model__reference": "initial"},
    "adapter with dropout": LORA,
    "adapter with dropout, two epochs, initial reference": {
        **LORA,
        "data__epochs_per_iteration": 2,
        "model__reference": "initial",
    },
    "optimizer carried on": {"model__carry_optimizer": "true"},
    "nothing held out": {"data__eval_prompts": None},
    "a gate that reverts": {"data__iterations": 3, "gate": {"tolerance": 0.0}},
    "an adapter behind a gate that always reverts": {
        **LORA,
        "gate": {"bounds": {"learning/logratios/chosen_fell": -1.0}},
    },
    "old iterations pruned": {"data__iterations": 3, "data__keep_iterations": 1},
}


def write_prompts(folder: Path) -> None:
    """Write ``train.jsonl``, 14 prompts, and ``eval.jsonl``, 6 others."""
    for name, start, count in (("train", 0, 14), ("eval", 50, 6)):
        records = [{"id": f"{name}{n}", "prompt": f"Count to {start + n}"} for n in range(count)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)


class GoneOn(NamedTuple):
    """What came of a command that was given again."""

    differences: list[str]  # from the uninterrupted run
    shards_twice: list[str]  # rollout shards that were written more often
    steps_twice: list[int]  # optimizer steps that were taken again
    outcome: Outcome


class Crashes:
    """Runs of a few variants: whole, ended by signals, and gone on.

    Args:
        policy: that they start from.
        folder: for their files.
    """

    def __init__(self, policy: Path, folder: Path) -> None:
        self.root = folder / "run"  # of all runs in turn, so that no path in a file tells them apart
        self._policy = policy
        self._folder = folder
        self._whole: dict[str, tuple[Path, Outcome]] = {}
        self.server = RunServer(folder / "output")
        write_prompts(folder)

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
            {"class_path": "support.crashing.Marks"},
        ]
        if "gate" in changes:
            gate = {"class_path": "sppo_lightning.callbacks.IterationGate", "init_args": changes.pop("gate")}
            callbacks.append(gate)
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

    def go_on(self, variant: str, ended: Sequence[Outcome]) -> GoneOn:
        """Give the command again, and compare everything with the uninterrupted run.

        Args:
            variant: of the runs.
            ended: the runs before, in their order.
        """
        kept, whole = self.whole(variant)
        saved = self.saved_step()
        last = self.run(variant)
        if last.status != 0:
            return GoneOn([f"exit status {last.status}: {last.output[-1000:]}"], [], [], last)
        found = [*differences(kept, self.root), *(f"left over: {name}" for name in leftovers(self.root))]
        if last.steps != whole.steps[saved:]:
            found.append(f"took the steps {last.steps} behind a checkpoint of {saved}")
        shards = Counter(path for outcome in (*ended, last) for path in outcome.shards)
        taken = {step for outcome in ended for step in outcome.steps}
        return GoneOn(
            found,
            sorted((shards - Counter(whole.shards)).elements()),
            [step for step in last.steps if step in taken],
            last,
        )

    def clear(self) -> None:
        """Remove the run."""
        shutil.rmtree(self.root, ignore_errors=True)
