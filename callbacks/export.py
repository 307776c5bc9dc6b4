"""Writes the policy as a Hugging Face folder at each iteration's end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.export.finished_run import RECORD
from sppo_lightning.policy.trained import TrainedPolicy
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import sync_folder, sync_tree, write_atomically
from sppo_lightning.training.hardware import is_dev_run


class PolicyExport(SelfPlayCallback):
    """Keeps ``policy/`` at the latest finished iteration: model, tokenizer, chat template, generation config.

    A policy with an adapter is written in PEFT's layout. The folder is replaced as a whole; its ``run.json`` says which
    iteration it comes out of, and the policy's fingerprint.

    Args:
        keep_every_iteration: also keep ``policies/000``, ``policies/001``, … one for each iteration.
    """

    def __init__(self, keep_every_iteration: bool = False) -> None:
        self.keep_every_iteration = keep_every_iteration

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back the folder that a killed run was about to replace."""
        folder = RunFolder(Path(trainer.default_root_dir)).policy
        if trainer.is_global_zero and not folder.exists() and _stale(folder).exists():
            _stale(folder).rename(folder)

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Export the policy."""
        if is_dev_run(trainer):
            return
        policy = data.module.trained_policy
        self.export(policy, data.folder.policy, iteration=iteration)
        if self.keep_every_iteration:
            self.export(policy, data.folder.kept_policy(iteration), iteration=iteration)

    def export(self, policy: TrainedPolicy, folder: Path, *, iteration: int) -> None:
        """Write the policy into ``folder``, replacing what is there in one step; all processes call it together.

        Args:
            policy: to be written.
            folder: where to.
            iteration: self-play iteration that it comes out of.
        """
        fresh = folder.with_name(f".{folder.name}.new")
        stale, first = _stale(folder), cast(Any, rank_zero_only).rank == 0
        if first:
            for leftover in (fresh, stale):
                shutil.rmtree(leftover, ignore_errors=True)
        policy.save(fresh, is_rank0=first)
        record = {"iteration": iteration, "fingerprint": policy.current().fingerprint()}
        if not first:
            return
        write_atomically(fresh / RECORD, json.dumps(record, indent=2).encode())
        sync_tree(fresh)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(stale, ignore_errors=True)


def _stale(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
