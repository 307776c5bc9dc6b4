"""Studies' folders as ``study`` leaves them, with made runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.made_runs import MadeRun, answer

from sppo_lightning.study.definition import Arm, Claim, Study
from sppo_lightning.study.outcomes import read_outcome
from sppo_lightning.study.page import Results, write_results
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.study.registration import register
from sppo_lightning.study.runner import state_of


@dataclass(frozen=True)
class MadeStudy:
    """A study's folder; each arm gains a little more than the one before it.

    Args:
        root: the folder.
        arms: their titles, by name.
        seeds: of each.
        settings: names.
        failed: messages of the runs that failed, by name.
        waiting: names of the runs that have not ended.
        text: stands for the study's question, its claim and its limit.
    """

    root: Path
    arms: Mapping[str, str] = field(default_factory=lambda: {"all": "All prompts", "easy": "Easiest 30 %"})
    seeds: tuple[int, ...] = (1, 2)
    settings: tuple[str, ...] = ("base",)
    failed: Mapping[str, str] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    text: str = "Easy beats all."

    @property
    def study(self) -> Study:
        """What it names."""
        first, *_, last = self.arms
        return Study(
            name=self.root.name,
            question=self.text,
            config=["base.yaml"],
            arms={name: Arm(title=title) for name, title in self.arms.items()},
            seeds=list(self.seeds),
            settings={name: {} for name in self.settings},
            claims={"first": Claim(self.text, last, first)},
            limits=[self.text],
            output=str(self.root),
        )

    def write(self) -> MadeStudy:
        """Write all files."""
        study = self.study
        runs = [
            PlannedRun(setting, seed, arm, config, self.root / "runs" / setting / f"seed-{seed}" / arm)
            for setting in self.settings
            for seed in self.seeds
            for arm in self.arms
            for config in [{"data": {"iterations": 2}, "trainer": {"default_root_dir": ""}}]
        ]
        digest = register(study, runs, {}).digest
        states, outcomes = {}, []
        for run in runs:
            if run.name not in self.waiting:
                self._write_run(run)
                if run.name not in self.failed:
                    outcomes.append(read_outcome(run))
            states[run.name] = state_of(study, run)
        write_results(study, Results(runs, states, outcomes, {}, digest))
        return self

    def _write_run(self, run: PlannedRun) -> None:
        place = list(self.arms).index(run.arm)
        MadeRun(
            run.folder,
            gain=0.2 + 0.1 * place + 0.01 * run.seed,
            response=answer,
            config={"seed_everything": run.seed},
        ).write()
        message = self.failed.get(run.name)
        state = {
            "status": "ended" if message is None else "failed",
            "seconds": 60.0,
            "message": message or "",
        }
        file = self.root / "state" / f"{run.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(state))
