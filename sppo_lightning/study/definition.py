"""The study file: a base config, arms, seeds, settings, and the claims that are tested."""

from __future__ import annotations

import copy
import json
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from sppo_lightning.limits import check_size
from sppo_lightning.paths import expand_path
from sppo_lightning.redaction import masked
from sppo_lightning.types import UserError, first_line

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        title: in tables; default: the arm's name.
        config: overrides of the base config, nested as a config file is.
        seeds: instead of the study's.
    """

    title: str | None = None
    config: Overrides = field(default_factory=dict)
    seeds: list[int] | None = None


@dataclass(frozen=True)
class Claim:
    """What is expected of two arms, written down before they run.

    Args:
        text: one sentence.
        arm: that is expected to be better.
        against: the arm that it is compared with; ``initial``: the policy that all start from.
        settings: in which it is tested, each by itself; default: all.
    """

    text: str
    arm: str
    against: str
    settings: list[str] | None = None


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        name: of the study; its default folder is ``runs/studies/<name>``.
        question: one sentence.
        config: files of the base config, later ones override earlier ones; relative to the study file.
        arms: by name.
        seeds: of each arm.
        settings: model, data and reward that the arms are compared on, each an override of the base config; default:
            the base config alone.
        claims: by name; each gets a verdict.
        matched: ``steps``: all arms must take equally many optimizer steps, by ``data.steps_per_iteration``;
            ``nothing``: each trains on the pairs that it has.
        limits: what the study cannot say, one sentence each, for its page.
        category_field: of a training prompt, that holds its category; default: ``category``.
        output: folder; default: ``runs/studies/<name>``.
    """

    name: str
    question: str
    config: list[str]
    arms: dict[str, Arm]
    seeds: list[int]
    settings: dict[str, Overrides] = field(default_factory=lambda: {"base": {}})
    claims: dict[str, Claim] = field(default_factory=dict)
    matched: Literal["steps", "nothing"] = "steps"
    limits: list[str] = field(default_factory=list)
    category_field: str | None = None
    output: str | None = None

    @property
    def folder(self) -> Path:
        """Where runs and results lie."""
        return Path(expand_path(self.output or f"runs/studies/{self.name}", key="output"))

    def seeds_of(self, arm: str) -> list[int]:
        """Return the seeds of an arm."""
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    def title(self, arm: str) -> str:
        """Return an arm's name in tables."""
        return self.arms[arm].title or arm

    def seeds_of_claim(self, claim: Claim) -> list[int]:
        """Return the seeds that both arms of a claim have."""
        ours = self.seeds_of(claim.arm)
        return (
            ours
            if claim.against == INITIAL
            else [seed for seed in ours if seed in self.seeds_of(claim.against)]
        )

    @property
    def tests(self) -> int:
        """How many verdicts a reading has: claims, each in its settings."""
        return sum(len(self.settings_of(claim)) for claim in self.claims.values())

    def settings_of(self, claim: Claim) -> list[str]:
        """Return the settings in which a claim is tested."""
        return claim.settings or list(self.settings)

    def registered(self) -> dict[str, Any]:
        """Return what is named before anything runs, as JSON types; the folder is no part of it."""
        found = asdict(self)
        del found["output"]
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return plain


INITIAL = "initial"  # the name that stands for the policy that all arms start from


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: if it is none, or names what is not there.
    """
    content = read_settings(path, "--config")
    try:
        study = _parsed(content)
    except (ArgumentError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    _check(study, path)
    return study


def read_settings(path: Path, key: str) -> Overrides:
    """Read a file of nested settings.

    Args:
        path: of the file.
        key: that named it, for errors.

    Raises:
        UserError: if it cannot be read, holds something else, or a secret.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
        check_size(content)
    except OSError as error:
        raise UserError(f"{key} {path}: cannot be read ({error.strerror}): name another file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{key} {path}: is no YAML ({first_line(error)}): correct it") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{key} {path}: holds no settings by name, as a study and a config do")
    if masked(content) != content:
        raise UserError(
            f"{key} {path}: holds a secret, which a study would write into its folder: take it from the environment "
            "instead"
        )
    return content


def _parsed(content: Mapping[str, Any]) -> Study:
    """Return the study; its overrides stay as they are, where the parser would make objects of their classes."""
    plain = copy.deepcopy(dict(content))
    settings = plain.pop("settings", {"base": {}})
    arms = {name: dict(arm or {}) for name, arm in plain.get("arms", {}).items()}
    overrides = {name: arm.pop("config", {}) for name, arm in arms.items()}
    for key, given in (
        ("settings", settings),
        *((f"settings.{name}", each) for name, each in settings.items()),
    ):
        _check_overrides(key, given)
    for name, given in overrides.items():
        _check_overrides(f"arms.{name}.config", given)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, as_group=False)
    given = parser.instantiate(parser.parse_object({**plain, "arms": arms}))
    study = Study(**{name: given[name] for name in Study.__dataclass_fields__})
    return replace(
        study,
        settings=settings,
        arms={name: replace(arm, config=overrides[name]) for name, arm in study.arms.items()},
    )


def _check_overrides(key: str, given: object) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{key} is {given!r:.60}: name settings below it, as in a config file")
    trainer = given.get("trainer")
    if "seed_everything" in given or (isinstance(trainer, dict) and "default_root_dir" in trainer):
        raise ValueError(
            f"{key} sets seed_everything or trainer.default_root_dir, which the study sets for each run"
        )


def _check(study: Study, path: Path) -> None:
    """Refuse a study that names what is not there, or nothing."""

    def refuse(message: str) -> None:
        raise UserError(f"--config {path}: {message}")

    for name in ("config", "arms", "seeds", "settings"):
        if not getattr(study, name):
            refuse(f"{name} is empty: name at least one")
    for file in study.config:
        if not (path.parent / file).is_file():
            refuse(f"config: {file} is not there; it is looked for beside the study file")
    for kind in ("arms", "settings"):
        for name in getattr(study, kind):
            if not isinstance(name, str):
                refuse(f"{kind}: {name!r} is no text: write it in quotes")
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                refuse(f"{kind}: {name!r} becomes a folder's name: use letters, digits, '-', '_' and '.'")
    if INITIAL in study.arms:
        refuse(f"arms: {INITIAL!r} stands for the policy that all arms start from: use another name")
    for arm in study.arms:
        seeds = study.seeds_of(arm)
        if not seeds:
            refuse(f"arms.{arm}: seeds is empty: leave it out, or name some")
        if len(set(seeds)) < len(seeds):
            refuse(f"arms.{arm}: its seeds {seeds} repeat one")
    for name, claim in study.claims.items():
        for arm in (claim.arm, *([] if claim.against == INITIAL else [claim.against])):
            if arm not in study.arms:
                refuse(f"claims.{name}: there is no arm {arm!r}; there are {', '.join(study.arms)}")
        for setting in claim.settings or ():
            if setting not in study.settings:
                refuse(
                    f"claims.{name}: there is no setting {setting!r}; there are {', '.join(study.settings)}"
                )
        if claim.against != INITIAL and not set(study.seeds_of(claim.arm)) & set(
            study.seeds_of(claim.against)
        ):
            refuse(f"claims.{name}: {claim.arm} and {claim.against} have no seed in common")
