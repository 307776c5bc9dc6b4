"""Checks a run folder before a run: can it be written, was it made by the same config, is its checkpoint whole."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.rollouts import FREE_SETTINGS
from sppo_lightning.types import UserError

# what may change between two starts of the same run: it decides speed, place or display, not results
FREE_KEYS = {
    "data.batch_size",
    "data.max_failed_share",
    "data.memory_check",
    "data.keep_iterations",
    "data.generator.init_args.weight_sync.init_args.folder",
    "data.test_prompts",
    "data.predict_prompts",
    "model.pair_forward",
    "model.policy.gradient_checkpointing",
}
TRAINER_KEYS = ("precision", "gradient_clip_val", "gradient_clip_algorithm")
RULE_CALLBACK = "DifficultyReestimation"


def check_writable(root: Path) -> None:
    """Refuse a run folder that cannot be written.

    Raises:
        UserError: naming the folder.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir={str(root)!r} cannot be written ({error.strerror}): choose another folder"
        ) from error


def check_checkpoint(path: Path, name: str) -> None:
    """Refuse a checkpoint that is missing or cut short, before the model loads.

    Raises:
        UserError: naming the path.
    """
    if not path.exists():
        raise UserError(
            f"{name}={str(path)!r}: no such file; check the path (it is relative to {Path.cwd()})"
        )
    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(
            f"{name}={str(path)!r} is no checkpoint, or was cut short: name another, or delete it"
        )


def check_same_run(root: Path, config: Mapping[str, Any]) -> None:
    """Refuse to mix two configs in one run folder.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    path = root / "config.yaml"
    if not path.exists():
        return
    try:
        before = dict(_decisive(yaml.safe_load(path.read_bytes())))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete it to go on, or choose another folder") from error
    now = dict(_decisive(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{root} holds a run with {key}={before.get(key)!r}, but this config has {now.get(key)!r}: "
                "use another trainer.default_root_dir, or delete that folder"
            )


def _decisive(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys that decide a run's results."""
    trainer = config["trainer"]
    yield from _flat("", {"seed_everything": config["seed_everything"]})
    for part in ("model", "data"):
        yield from ((key, value) for key, value in _flat(part, config[part]) if not _free(key))
    yield from _flat("trainer", {name: trainer.get(name) for name in TRAINER_KEYS})
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(callback["class_path"]).endswith(RULE_CALLBACK):
            yield from _flat(f"trainer.callbacks.{RULE_CALLBACK}", callback.get("init_args") or {})


def _free(key: str) -> bool:
    """Whether a key decides speed or place only."""
    strategy = key.startswith(("data.generator.", "data.reward."))
    return key in FREE_KEYS or (strategy and key.rpartition(".")[2] in FREE_SETTINGS)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    else:
        yield prefix, value
