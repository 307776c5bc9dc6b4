"""A run folder as it is found after training: its config, its policies, which iteration each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch

from sppo_lightning.export.stored_run import compute_dtype, read_run
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.pretrained import DTYPES, load_model_config
from sppo_lightning.resume.checkpoints import state_file
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER_CONFIG = "adapter_config.json"
RECORD = "run.json"  # in a policy's folder: its iteration and fingerprint


@dataclass(frozen=True)
class FinishedRun:
    """A policy of a run, and what made it.

    Args:
        folder: of the run.
        config: the run's settings, as its ``config.yaml`` has them.
        policy_config: how the policy was held; an adapter's base is the one that it was trained on.
        iteration: the self-play iteration that the policy comes out of.
        policy_folder: of the policy: the model, or the adapter in PEFT's layout.
    """

    folder: RunFolder
    config: Mapping[str, Any]
    policy_config: PolicyConfig
    iteration: int
    policy_folder: Path

    @property
    def has_adapter(self) -> bool:
        """Whether the run trained an adapter."""
        return self.policy_config.lora is not None

    @property
    def has_fresh_adapter(self) -> bool:
        """Whether it was a fresh adapter, which changes nothing at the start."""
        return self.policy_config.lora is not None and self.policy_config.lora.adapter is None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the products in training."""
        return compute_dtype(self.config)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the weights in training, except quantised ones."""
        return DTYPES.get(self.policy_config.dtype, self.compute_dtype if self.has_adapter else torch.float32)

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """Dtype of what was rounded most in training; quantised weights are never finer than bfloat16."""
        if self.policy_config.quantization != "none":
            return torch.bfloat16
        return max((self.compute_dtype, self.weights_dtype), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def base_as_reference(self) -> int | None:
        """Iteration whose stored reference is the adapter's base alone; ``None`` if none is known to be."""
        if not self.has_fresh_adapter:
            return None
        stays = self.config["model"]["reference"] == "initial"
        store = self.folder.iteration(self.iteration if stays else 0)
        manifest = store.read_manifest() or {}
        known = store.pairs_path.exists() and manifest.get("reference_fingerprint") is not None
        return int(manifest["iteration"]) if known else None

    def model_config(self) -> PretrainedConfig:
        """Return the settings of the trained model, or of the base that an adapter was trained on.

        Raises:
            UserError: if the base is not there any more.
        """
        pretrained, trust = self.policy_config.pretrained, self.policy_config.trust_remote_code
        if not self.has_adapter:
            return load_model_config(
                str(self.policy_folder), key="the run's policy", trust_remote_code=trust, expect="causal-lm"
            )
        given = self.config["model"]["policy"]["pretrained"]
        try:
            return load_model_config(
                pretrained, key="model.policy.pretrained", trust_remote_code=trust, expect="causal-lm"
            )
        except UserError as error:
            raise UserError(
                f"the base that the run's adapter was trained on, {pretrained}, cannot be read ({error}); config.yaml "
                f"names {given}, which from here is {Path(given).resolve() if Path(given).exists() else 'not there'}. "
                f"If the base moved, correct base_model_name_or_path in {self.policy_folder / ADAPTER_CONFIG}"
            ) from error

    def adapter_settings(self) -> dict[str, Any]:
        """Return the ``adapter_config.json`` of a trained adapter."""
        return read_json(self.policy_folder / ADAPTER_CONFIG)


def open_run(root: Path, *, iteration: int | Literal["best"] | None = None) -> FinishedRun:
    """Find a policy of a run.

    Args:
        root: the run's folder.
        iteration: self-play iteration to take the policy from; ``best``: that of ``best/``; ``None``: that of
            ``policy/``, the last finished one unless the run reverted to an earlier one.

    Raises:
        UserError: if this is no run, or the policy is not there.
    """
    found = read_run(root)
    folder, config, policy = found.folder, found.config, found.policy_config
    place = folder.policy
    latest = latest_iteration(folder)
    if latest is None:
        raise UserError(
            f"{root} has no finished iteration yet, so that there is no policy to export: run fit to the end of an "
            "iteration"
        )
    if iteration == "best":
        best = best_iteration(folder)
        if best is None:
            raise UserError(
                f"{folder.best} is not there: no finished iteration had a better held-out reward than the initial "
                "policy, or the run had no data.eval_prompts; leave --iteration out for the last one"
            )
        return FinishedRun(folder, config, _on_its_base(policy, folder.best), best, folder.best)
    if latest < 0 and iteration is None:
        raise UserError(
            f"{root} reverted to the policy that it started from, {policy.pretrained}: there is nothing else to export"
        )
    kept_place = folder.kept_policy(latest if iteration is None else iteration)
    if iteration is None:
        iteration = latest
    elif kept_place.is_dir():
        place = kept_place
    elif iteration != latest:
        kept = sorted({*folder.kept_policies(), *([latest] if latest >= 0 else [])})
        raise UserError(
            f"{root} holds no policy of iteration {iteration}, only of {', '.join(map(str, kept))}: name one of those "
            "(callback PolicyExport with keep_every_iteration: true keeps all)"
        )
    return FinishedRun(folder, config, _on_its_base(policy, place), iteration, place)


def latest_iteration(folder: RunFolder) -> int | None:
    """Return the iteration that ``policy/`` comes out of; -1: the initial policy, which the run reverted to.

    Returns:
        ``None`` if no iteration is finished.

    Raises:
        UserError: if what says it is damaged.
    """
    return _iteration_of(folder.policy, folder) if folder.policy.is_dir() else None


def best_iteration(folder: RunFolder) -> int | None:
    """Return the iteration that ``best/`` comes out of; ``None`` if it is not there."""
    return _iteration_of(folder.best, folder) if folder.best.is_dir() else None


def _on_its_base(policy: PolicyConfig, place: Path) -> PolicyConfig:
    """Return an adapter's settings with the base that it was trained on.

    The adapter's folder knows it from wherever it is read; the run's config may have a path that was relative.
    """
    if policy.lora is None:
        return policy
    trained_on = read_json(place / ADAPTER_CONFIG).get("base_model_name_or_path")
    given = Path(policy.pretrained)
    if not trained_on or (given.exists() and given.resolve() == Path(trained_on).resolve()):
        return policy
    return replace(policy, pretrained=trained_on)


def _iteration_of(place: Path, folder: RunFolder) -> int | None:
    """Return the iteration that ``policy/`` comes out of; ``None`` if there is no finished one."""
    path = place / RECORD
    if not path.is_file():
        return _last_finished(folder)
    try:
        return int(read_json(path)["iteration"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): delete it") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return what a policy's folder says of it.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): restore it") from error
    return content


def _last_finished(folder: RunFolder) -> int | None:
    """Return the run's last finished iteration, for a ``policy/`` that does not say its own."""
    last = folder.last_checkpoint
    if last.exists():
        try:
            checkpoint = torch.load(state_file(last), map_location="cpu", mmap=True, weights_only=True)
            finished = int(checkpoint["SelfPlayDataModule"]["finished"])
        except (OSError, RuntimeError, KeyError, UnpicklingError) as error:
            raise UserError(f"{last} is damaged ({first_line(error)}): restore or delete it") from error
    else:
        finished = 0
        while folder.iteration(finished).complete:
            finished += 1
    return finished - 1 if finished else None
