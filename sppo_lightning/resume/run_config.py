"""Checks a run folder before a run: can it be written, was it made by the same config, where does it resume."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sppo_lightning.limits import check_size
from sppo_lightning.redaction import masked
from sppo_lightning.resume.checkpoints import check_checkpoint
from sppo_lightning.store.identity import NOTHING_FREE, free_settings, parameters
from sppo_lightning.store.integrity import check_iterations
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import ResumeMode, UserError

DAMAGED = (
    yaml.YAMLError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    RecursionError,
)  # of a config.yaml
TRAINER_KEYS = ("precision", "gradient_clip_val", "gradient_clip_algorithm")
RULE_CALLBACKS = ("DifficultyReestimation", "IterationGate")  # those that decide results
_WRITE_CONFIG = (
    "restore it from a copy, or, if you are sure that this is the config of that run, write it by giving the same "
    "command with --print_config and sending its output there; otherwise use another trainer.default_root_dir"
)


def check_writable(folder: RunFolder) -> None:
    """Refuse a run folder that cannot be written.

    Raises:
        UserError: naming the folder.
    """
    root = folder.root
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir={str(root)!r} cannot be written ({error.strerror}): choose another folder"
        ) from error


def recorded_setting(folder: RunFolder, key: str) -> tuple[bool, Any]:
    """Return whether a folder holds a run, and a setting of that run's config; ``None`` where it has none.

    Args:
        folder: of the run.
        key: dotted.

    Raises:
        UserError: if the config cannot be read.
    """
    if not folder.config.exists():
        return False, None
    try:
        value = dict(_read(folder.config))
        for name in key.split("."):
            value = value.get(name) or {}
    except DAMAGED as error:
        raise UserError(f"{folder.config} is damaged: {_WRITE_CONFIG}") from error
    return True, value or None


def resume_path(
    folder: RunFolder,
    mode: ResumeMode,
    config: Mapping[str, Any],
    *,
    sections: Mapping[str, type],
    given: Path | None = None,
) -> Path | None:
    """Return the checkpoint that a run resumes from; ``None``: it starts with the initial policy.

    Without a checkpoint it still takes up the rollouts of iteration 0, if some are stored. Nothing is changed.

    Args:
        folder: of the run.
        mode: what to do where it holds a run, or none.
        config: the resolved config of the run that is to start.
        sections: classes of the parts of a config that name none, by dotted key, e.g. ``model.policy``.
        given: a checkpoint that the user names; ``None``: the run's own.

    Raises:
        UserError: if the folder holds another config's run, or one that cannot be resumed, or not what ``mode``
            asks for.
    """
    root, last = folder.root, folder.last_checkpoint
    stored = [place for place in (folder.iterations, last.parent) if place.is_dir() and any(place.iterdir())]
    if mode == "never" and (stored or folder.config.exists()):
        raise UserError(
            f"data.resume=never, but {root} holds a run: use another trainer.default_root_dir, or data.resume=auto to "
            "resume it"
        )
    if stored and not folder.config.exists():
        raise UserError(f"{root} holds a run, but its config.yaml is gone: {_WRITE_CONFIG}")
    check_same_run(folder, config, sections)
    begun = check_iterations(folder)
    if given is not None:
        check_checkpoint(given, "ckpt_path")
        return given
    if os.path.lexists(last):
        check_checkpoint(last, "the run's own checkpoint")
        return last
    if mode == "must":
        raise UserError(
            f"data.resume=must, but there is no {last}: check trainer.default_root_dir, or use data.resume=auto"
        )
    if begun > 1 and config["trainer"].get("enable_checkpointing") is not False:
        raise UserError(
            f"{last} is gone, and iterations/{begun - 1:03d} was sampled from the policy that it held: restore it, or "
            "start anew in another trainer.default_root_dir"
        )
    return None


def _read(path: Path) -> Any:
    content = yaml.safe_load(path.read_bytes())
    check_size(content)
    return content


def check_same_run(folder: RunFolder, config: Mapping[str, Any], sections: Mapping[str, type]) -> None:
    """Refuse to mix two configs in one run folder.

    What may change, since it decides speed, place or display only, each class says by its ``free_settings``. A setting
    that the older config does not have counts as its class's default: the version that wrote it did not know it.

    Args:
        folder: of the run.
        config: the resolved config of the run that is to start.
        sections: see :func:`resume_path`.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    path = folder.config
    if not path.exists():
        return
    try:
        # masked on both sides: files of older versions hold secrets, and a key may be another one now
        before = _decisive(masked(_read(path)))
        found = next(_differences("", before, _decisive(masked(config)), sections, NOTHING_FREE), None)
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {_WRITE_CONFIG}") from error
    if found is not None:
        raise UserError(
            f"{folder.root} holds a run with {found.key}={found.before!r}, but this config has {found.now!r}: "
            "use another trainer.default_root_dir, or delete that folder"
        )


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a config that may decide a run's results."""
    trainer = config["trainer"]
    given = trainer.get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    rules = {
        name: next((item for item in reversed(callbacks) if str(item["class_path"]).endswith(name)), None)
        for name in RULE_CALLBACKS
    }
    return {
        **{name: config[name] for name in ("seed_everything", "model", "data")},
        "trainer": {
            **{name: trainer.get(name) for name in TRAINER_KEYS},
            "callbacks": rules,
        },
    }


class _Difference(NamedTuple):
    """A setting that two configs have otherwise."""

    key: str  # dotted
    before: Any
    now: Any


def _differences(
    key: str, before: Any, now: Any, sections: Mapping[str, type], free: frozenset[str]
) -> Iterator[_Difference]:
    """Yield what differs in two values of a key, in the order of the keys.

    Args:
        key: dotted; empty for the whole config.
        before: its value in the older config.
        now: its present one.
        sections: see :func:`resume_path`.
        free: what the component around decides nothing by, for a class that does not say.
    """
    if not all(value is None or isinstance(value, Mapping) for value in (before, now)):
        if before != now:
            yield _Difference(key, before, now)
        return
    owner: Callable[..., Any] | None = None if None in (before, now) else sections.get(key)
    left_out = free_settings(owner, NOTHING_FREE)
    before, now = before or {}, now or {}
    if "class_path" in before or "class_path" in now:
        kinds = before.get("class_path"), now.get("class_path")
        if kinds[0] != kinds[1]:
            yield _Difference(f"{key}.class_path", *kinds)
            return
        owner = _imported(kinds[1])
        if owner is not None:
            left_out = free = free_settings(owner, free)
        key, before, now = f"{key}.init_args", _arguments(before), _arguments(now)
    if owner is not None:
        before, now = ({**_defaults(owner), **_given(value)} for value in (before, now))
    for name in sorted((before.keys() | now.keys()) - left_out, key=str):
        inner = f"{key}.{name}".lstrip(".")
        yield from _differences(inner, before.get(name), now.get(name), sections, free)


def _arguments(component: Mapping[str, Any]) -> dict[str, Any]:
    return {**(component.get("init_args") or {}), **(component.get("dict_kwargs") or {})}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _imported(class_path: str) -> Callable[..., Any] | None:
    """Return a class of the present config, which the parser has imported; ``None``: it is there no longer."""
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def _defaults(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return what keys stand for that a config lacks; null is left out of one too, so none that may be null."""
    return {
        name: taken.default
        for name, taken in parameters(owner).items()
        if isinstance(taken.default, bool | int | float | str) and "None" not in str(taken.annotation)
    }
