"""A run folder as it is found after training: its config, its policies, which iteration each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml

from sppo_lightning.policy_config import LoRAConfig, PolicyConfig
from sppo_lightning.pretrained import DTYPES, load_model_config
from sppo_lightning.rollouts import RunFolder
from sppo_lightning.trainer import COMPUTE_DTYPES
from sppo_lightning.types import UserError, first_line

PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class FinishedRun:
    """A policy of a run, and what made it.

    Args:
        folder: of the run.
        config: the run's settings, as its ``config.yaml`` has them.
        policy: how the policy was held.
        iteration: the self-play iteration that the policy comes out of.
        place: the policy's folder: the model, or the adapter in PEFT's layout.
    """

    folder: RunFolder
    config: Mapping[str, Any]
    policy: PolicyConfig
    iteration: int
    place: Path

    @property
    def adapted(self) -> bool:
        """Whether the run trained an adapter."""
        return self.policy.lora is not None

    @property
    def held_dtype(self) -> torch.dtype:
        """Dtype of the weights in training, quantised ones aside."""
        precision = str(self.config["trainer"].get("precision"))
        compute = COMPUTE_DTYPES[PRECISIONS.get(precision, precision)]
        return DTYPES.get(self.policy.dtype, compute if self.adapted else torch.float32)

    def base_dtype(self) -> torch.dtype:
        """Return the dtype that the base's config names; float32 where it names none, as of a ``.gguf`` file.

        Raises:
            UserError: if the base is not there any more.
        """
        pretrained, trust = self.policy.pretrained, self.policy.trust_remote_code
        try:
            config = load_model_config(
                pretrained, key="model.policy.pretrained", trust_remote_code=trust, expect="causal-lm"
            )
        except UserError as error:
            raise UserError(
                f"the base of the run's adapter cannot be read: {error}. If it moved, or its path is relative to "
                f"another folder than {Path.cwd()}, correct it in {self.folder.root / 'config.yaml'}"
            ) from error
        return getattr(config, "dtype", None) or torch.float32

    def adapter_settings(self) -> dict[str, Any]:
        """Return the ``adapter_config.json`` of a trained adapter."""
        settings: dict[str, Any] = json.loads((self.place / "adapter_config.json").read_bytes())
        return settings


def open_run(root: Path, *, iteration: int | None = None) -> FinishedRun:
    """Find a policy of a run.

    Args:
        root: the run's folder.
        iteration: self-play iteration to take the policy from; ``None``: the last finished one.

    Raises:
        UserError: if this is no run, or the policy is not there.
    """
    path = root / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{str(root)!r} is no run: it has no config.yaml; give a folder that was a fit's trainer.default_root_dir"
        )
    try:
        config = yaml.safe_load(path.read_bytes())
        settings = dict(config["model"]["policy"])
        if settings.get("lora") is not None:
            settings["lora"] = LoRAConfig(**settings["lora"])
        policy = PolicyConfig(**settings)
        precision = str(config["trainer"].get("precision"))
        if PRECISIONS.get(precision, precision) not in COMPUTE_DTYPES:
            raise KeyError(f"trainer.precision: {precision}")
    except UserError:
        raise
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a run's config ({' '.join(str(error).split())}): restore it, or export with "
            "the version of sppo-lightning that wrote it"
        ) from error
    folder = RunFolder(root)
    latest = _last_finished(folder)
    place = root / "policy"
    if not place.is_dir() or latest is None:
        raise UserError(
            f"{root} has no finished iteration yet, so that there is no policy to export: run fit to the end of an "
            "iteration"
        )
    if iteration is None or iteration == latest:
        return FinishedRun(folder, config, policy, latest, place)
    place = root / "policies" / f"{iteration:03d}"
    if not place.is_dir():
        kept = sorted({*(int(path.name) for path in _kept(root)), latest})
        raise UserError(
            f"{root} holds no policy of iteration {iteration}, only of {', '.join(map(str, kept))}: name one of those "
            "(callback PolicyExport with keep_every_iteration: true keeps all)"
        )
    return FinishedRun(folder, config, policy, iteration, place)


def _last_finished(folder: RunFolder) -> int | None:
    """Return the iteration that ``policy/`` comes out of: the checkpoint knows, which is written right after it."""
    last = folder.root / "checkpoints" / "last.ckpt"
    if last.exists():
        try:
            checkpoint = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
            finished = int(checkpoint["SelfPlayDataModule"]["finished"])
        except (OSError, RuntimeError, KeyError, UnpicklingError) as error:
            raise UserError(f"{last} is damaged ({first_line(error)}): restore or delete it") from error
    else:
        finished = 0
        while folder.iteration(finished).complete:
            finished += 1
    return finished - 1 if finished else None


def _kept(root: Path) -> list[Path]:
    return [path for path in (root / "policies").glob("[0-9]*") if path.name.isdigit()]
