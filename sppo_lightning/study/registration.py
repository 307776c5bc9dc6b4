"""What a study named before anything ran: written once, and compared at each later start."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_lightning.study.definition import Study
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import UserError


@dataclass(frozen=True)
class Registration:
    """Content of a study's ``study.json``.

    Args:
        digest: of the study and of the configs of its runs.
        pinned: settings of all runs that ``fit`` would have taken from the day and the machine.
        study: what the study file named.
        configs: of each run, by its name, without the places of files.
    """

    digest: str
    pinned: Mapping[str, Any]
    study: Mapping[str, Any]
    configs: Mapping[str, Any]


def registration_path(study: Study) -> Path:
    """Return the file."""
    return study.folder / "study.json"


def read_registration(study: Study) -> Registration | None:
    """Return what was written down; ``None``: the study has not begun.

    Raises:
        UserError: if the file is damaged.
    """
    path = registration_path(study)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return Registration(**{name: content[name] for name in Registration.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: restore it, or give the study another output") from error


def register(study: Study, runs: Sequence[PlannedRun], pinned: Mapping[str, Any]) -> Registration:
    """Write down what the study names, before anything runs."""
    named, configs = study.registered(), _configs(runs)
    text = json.dumps([named, configs], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    content = {"digest": digest, "registered": time.strftime("%Y-%m-%d"), "pinned": pinned}
    content |= {"study": named, "configs": configs}
    write_atomically(registration_path(study), (json.dumps(content, indent=1) + "\n").encode())
    return Registration(digest, pinned, named, configs)


def check_registered(study: Study, runs: Sequence[PlannedRun], before: Registration) -> None:
    """Refuse a study that names something else than it did before it ran.

    Raises:
        UserError: naming what has changed.
    """
    named, configs = study.registered(), _configs(runs)
    changed = [name for name in named if before.study.get(name) != named[name]]
    if not changed:
        changed = [f"config of {name}" for name in configs if before.configs.get(name) != configs[name]][:1]
    if changed:
        raise UserError(
            f"{study.folder} holds a study whose {', '.join(changed)} was named otherwise before it ran: put it back, "
            "or give this one another name or output"
        )


def _configs(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Return the runs' configs as JSON types, without the study's own folder, which may be moved."""
    found = {}
    for run in runs:
        config: dict[str, Any] = json.loads(json.dumps(run.config, default=str))
        config["trainer"].pop("default_root_dir")
        generator = config["data"].get("generator")
        if isinstance(generator, dict):
            generator.get("init_args", {}).pop("folder", None)
        found[run.name] = config
    return found
