"""Checks a run folder before a run: can it be written, was it made by the same config, where does the run go on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.resume.checkpoints import check_checkpoint
from sppo_lightning.store.integrity import check_iterations
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import SPEED_OR_PLACE, ResumeMode, UserError

# what may change between two starts of the same run: it decides speed, place or display, not results
FREE_KEYS = {
    "data.batch_size",
    "data.resume",
    "data.keep_iterations",
    "data.max_failed_share",
    "data.memory_check",
    "data.generator.init_args.weight_sync.init_args.folder",
    "data.test_prompts",
    "data.predict_prompts",
    "model.pair_forward",
    "model.policy.gradient_checkpointing",
}
TRAINER_KEYS = ("precision", "gradient_clip_val", "gradient_clip_algorithm")
RULE_CALLBACK = "DifficultyReestimation"
_WRITE_CONFIG = (
    "restore it from a copy, or, if you are sure that this is the config of that run, write it by giving the same "
    "command with --print_config and sending its output there; otherwise use another trainer.default_root_dir"
)


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


def resume_path(
    root: Path, mode: ResumeMode, config: Mapping[str, Any], *, given: Path | None = None
) -> Path | None:
    """Return the checkpoint that a run goes on from; ``None``: it starts with the initial policy.

    Without a checkpoint it still takes up the rollouts of iteration 0, if some are stored. Nothing is changed.

    Args:
        root: the run folder.
        mode: what to do where it holds a run, or none.
        config: the resolved config of the run that is to start.
        given: a checkpoint that the user names; ``None``: the run's own.

    Raises:
        UserError: if the folder holds another config's run, or one that cannot be gone on with, or not what ``mode``
            asks for.
    """
    last = root / "checkpoints" / "last.ckpt"
    stored = [
        place for place in (root / "iterations", last.parent) if place.is_dir() and any(place.iterdir())
    ]
    if mode == "never" and (stored or (root / "config.yaml").exists()):
        raise UserError(
            f"data.resume=never, but {root} holds a run: use another trainer.default_root_dir, or data.resume=auto to "
            "go on with it"
        )
    if stored and not (root / "config.yaml").exists():
        raise UserError(f"{root} holds a run, but its config.yaml is gone: {_WRITE_CONFIG}")
    check_same_run(root, config)
    begun = check_iterations(RunFolder(root))
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
        raise UserError(f"{path} is damaged: {_WRITE_CONFIG}") from error
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
    return key in FREE_KEYS or (strategy and key.rpartition(".")[2] in SPEED_OR_PLACE)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    else:
        yield prefix, value
