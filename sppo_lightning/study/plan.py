"""The runs that a study stands for: each one ``fit`` with a config of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sppo_lightning.study.definition import Overrides, Study, read_settings
from sppo_lightning.training.precision import fast_precision
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


def plan(study: Study, study_file: Path, pinned: Mapping[str, Any] | None = None) -> list[PlannedRun]:
    """Return the runs, those that start from the same policy with the same seed after each other.

    Args:
        study: what is compared.
        study_file: where it was read, which its config files lie beside.
        pinned: settings, nested, that ``fit`` would take from the day or the machine.

    Raises:
        UserError: if the runs cannot be compared.
    """
    base: Overrides = dict(pinned or {})
    for file in study.config:
        base = merged(base, read_settings(study_file.parent / file, "config"))
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
    for run in found:
        _check_data(run)
    _check_comparable(study, found)
    for run in found:
        _share_responses(run.config, study.folder / "responses" / run.setting)
    return found


def pinned_settings(study: Study, study_file: Path) -> Overrides:
    """Return what ``fit`` would take from the day and the machine, for all runs of a study alike."""
    base: Overrides = {}
    for file in study.config:
        base = merged(base, read_settings(study_file.parent / file, "config"))
    found: Overrides = {"model": {"policy": {"template_date": date.today().isoformat()}}}
    if not _setting(base, "trainer.plugins"):  # one of them may be a precision
        found["trainer"] = {"precision": fast_precision(str(_setting(base, "trainer.accelerator") or "auto"))}
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


def of_arms(runs: list[PlannedRun], arms: Sequence[str]) -> list[PlannedRun]:
    """Return the runs of some arms: setting after setting, seed after seed, the arms of a seed in the order given.

    Args:
        runs: of the study, or a job's share.
        arms: their names.
    """
    groups = list(dict.fromkeys((run.setting, run.seed) for run in runs))
    return sorted(
        (run for run in runs if run.arm in arms),
        key=lambda run: (groups.index((run.setting, run.seed)), arms.index(run.arm)),
    )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Overrides:
    """Return nested settings, those of ``above`` replacing those of ``below``.

    Where ``above`` names another class than ``below``, the arguments of the old one go with it.
    """
    found = copy.deepcopy(dict(below))
    for name, value in above.items():
        under = found.get(name)
        if isinstance(under, str) and isinstance(value, Mapping) and "init_args" in value:
            under = {"class_path": under}  # the short form of a class without arguments
        if isinstance(under, dict) and isinstance(value, Mapping):
            found[name] = merged({} if _other_class(under, value) else under, value)
        else:
            found[name] = copy.deepcopy(value)
    return found


def _other_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether settings name another class; one may be named by its last name alone."""
    ours, theirs = (str(each.get("class_path", "")).rpartition(".") for each in (above, below))
    given = "class_path" in above and "class_path" in below
    return given and (ours[2] != theirs[2] or bool(ours[0] and theirs[0] and ours[0] != theirs[0]))


def _check_data(run: PlannedRun) -> None:
    """Refuse settings that a study cannot read its results with."""
    data = run.config.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("iterations"), int):
        raise UserError(
            f"arm {run.arm} in setting {run.setting} has no data.iterations: set it in the base config"
        )
    if not data.get("eval_prompts"):
        raise UserError(
            f"arm {run.arm} in setting {run.setting} has no data.eval_prompts: arms are compared on held-out prompts"
        )
    for name, why in {
        "keep_iterations": "a study counts the sampled tokens of all iterations",
        "resume": "a study resumes what was interrupted",
    }.items():
        if data.get(name) not in (None, "auto"):
            raise UserError(
                f"arm {run.arm} in setting {run.setting} sets data.{name}: leave it out, as {why}"
            )


def _check_comparable(study: Study, runs: list[PlannedRun]) -> None:
    """Refuse arms that start from other policies, answer other prompts, or train for another number of steps."""
    for setting in study.settings:
        here = [run for run in runs if run.setting == setting]
        _same(
            setting,
            "held-out prompts (data.eval_prompts)",
            {run.arm: run.config["data"]["eval_prompts"] for run in here},
        )
        for what, keys in SAME_IN_A_SETTING.items():
            _same(setting, what, {run.arm: [_setting(run.config, key) for key in keys] for run in here})
        if study.matched == "steps":
            steps = {run.arm: _steps(run) for run in here}
            _same(setting, "optimizer steps (iterations, steps_per_iteration, pairs_per_step)", steps)


SAME_IN_A_SETTING = {
    "policies to start from (model.policy)": (
        *("model.policy.pretrained", "model.policy.quantization", "model.policy.dtype"),
        *("model.policy.chat_template", "model.policy.lora.adapter", "trainer.precision"),
    ),
    "prompts (data.system_prompt, columns, max_prompt_tokens)": (
        *("data.system_prompt", "data.columns", "data.max_prompt_tokens"),
    ),
    "lengths of answers (data.generator)": (
        *("data.generator.init_args.max_new_tokens", "data.generator.init_args.stop"),
        "data.generator.init_args.max_total_tokens",
    ),
}
"""Settings that decide the held-out answers of the initial policy."""


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """Return a setting by its dotted key; ``None``: it is not set."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _steps(run: PlannedRun) -> tuple[Any, Any, Any]:
    data = run.config["data"]
    if data.get("steps_per_iteration") is None:
        raise UserError(
            f"arm {run.arm} in setting {run.setting} has no data.steps_per_iteration, so that its number of optimizer "
            "steps follows its pairs: set it, or matched: nothing in the study file"
        )
    return data["iterations"], data["steps_per_iteration"], data.get("pairs_per_step")


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
    generator = config["data"].get("generator")
    if isinstance(generator, str):
        generator = {"class_path": generator}
    if (
        isinstance(generator, dict)
        and generator.get("class_path", "").rpartition(".")[2] != CACHE.rpartition(".")[2]
    ):
        config["data"]["generator"] = {
            "class_path": CACHE,
            "init_args": {"generator": generator, "folder": str(folder)},
        }
