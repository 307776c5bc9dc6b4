"""The runs that a study stands for: each one ``fit`` with a config of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.study.definition import Overrides, Study
from sppo_lightning.types import UserError

CACHE = "sppo_lightning.generation.CachedGenerator"


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed in one setting.

    Args:
        setting: model, data and reward.
        seed: of the run.
        arm: how it trains.
        config: the whole config.
        folder: the run's.
    """

    setting: str
    seed: int
    arm: str
    config: Overrides
    folder: Path

    @property
    def name(self) -> str:
        """Of the run, in messages and file names."""
        return f"{self.setting}/seed-{self.seed}/{self.arm}"


def plan(study: Study, study_file: Path) -> list[PlannedRun]:
    """Return the runs, those that start from the same policy with the same seed after each other.

    Args:
        study: what is compared.
        study_file: where it was read, which its config files lie beside.

    Raises:
        UserError: if the runs cannot be compared.
    """
    base: Overrides = {}
    for file in study.config:
        content = yaml.safe_load((study_file.parent / file).read_bytes())
        base = merged(base, content if isinstance(content, dict) else {})
    seeds = sorted({seed for arm in study.arms for seed in study.seeds_of(arm)})
    found = []
    for setting, overrides in study.settings.items():
        for seed in seeds:
            for arm, settings in study.arms.items():
                if seed in study.seeds_of(arm):
                    config = merged(merged(base, overrides), settings.config)
                    folder = study.folder / "runs" / setting / f"seed-{seed}" / arm
                    config["seed_everything"] = seed
                    config = merged(config, {"trainer": {"default_root_dir": str(folder)}})
                    found.append(PlannedRun(setting, seed, arm, config, folder))
    _check_comparable(study, found)
    for run in found:
        _share_responses(run.config, study.folder / "responses" / run.setting)
    return found


def of_job(runs: list[PlannedRun], job: int, jobs: int) -> list[PlannedRun]:
    """Return a job's share: runs that share their first responses stay together.

    Args:
        runs: of the study.
        job: number of the job, from 1.
        jobs: how many there are.
    """
    groups = list(dict.fromkeys((run.setting, run.seed) for run in runs))
    return [run for run in runs if groups.index((run.setting, run.seed)) % jobs == job - 1]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Overrides:
    """Return nested settings, those of ``above`` replacing those of ``below``.

    Where ``above`` names another class than ``below``, the arguments of the old one go with it.
    """
    found = copy.deepcopy(dict(below))
    for name, value in above.items():
        under = found.get(name)
        if isinstance(under, dict) and isinstance(value, Mapping):
            other = "class_path" in value and value["class_path"] != under.get("class_path")
            found[name] = merged({} if other else under, value)
        else:
            found[name] = copy.deepcopy(value)
    return found


def _check_comparable(study: Study, runs: list[PlannedRun]) -> None:
    """Refuse arms that are measured on other held-out prompts, or that train for another number of steps."""
    for setting in study.settings:
        here = [run for run in runs if run.setting == setting]
        held_out = {run.arm: run.config.get("data", {}).get("eval_prompts") for run in here}
        lacking = next((arm for arm, prompts in held_out.items() if not prompts), None)
        if lacking is not None:
            raise UserError(
                f"arm {lacking} in setting {setting} has no data.eval_prompts: arms are compared on held-out prompts"
            )
        _same(setting, "held-out prompts (data.eval_prompts)", held_out)
        if study.matched == "steps":
            steps = {run.arm: _steps(run) for run in here}
            _same(setting, "optimizer steps (iterations, steps_per_iteration, pairs_per_step)", steps)


def _steps(run: PlannedRun) -> tuple[Any, Any, Any]:
    data = run.config.get("data", {})
    if data.get("steps_per_iteration") is None:
        raise UserError(
            f"arm {run.arm} in setting {run.setting} has no data.steps_per_iteration, so that its number of optimizer "
            "steps follows its pairs: set it, or matched: nothing in the study file"
        )
    return data.get("iterations"), data["steps_per_iteration"], data.get("pairs_per_step")


def _same(setting: str, what: str, values: Mapping[str, Any]) -> None:
    first = next(iter(values))
    for arm, value in values.items():
        if value != values[first]:
            raise UserError(
                f"setting {setting}: arms {first} and {arm} have different {what}: {values[first]} and {value}; they "
                "cannot be compared"
            )


def _share_responses(config: Overrides, folder: Path) -> None:
    """Let the run take the initial policy's responses from the runs before it."""
    generator = config.get("data", {}).get("generator")
    if isinstance(generator, dict) and generator.get("class_path") != CACHE:
        config["data"]["generator"] = {
            "class_path": CACHE,
            "init_args": {"generator": generator, "folder": str(folder)},
        }
