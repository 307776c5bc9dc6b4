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
from sppo_lightning.evaluation.gate import best_finished
from sppo_lightning.evaluation.results import held_out_results
from sppo_lightning.export.finished_run import RECORD
from sppo_lightning.policy.trained import TrainedPolicy
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import (
    fresh_folder,
    link_weights,
    replace_folder,
    restore_replaced,
    write_atomically,
)
from sppo_lightning.training.hardware import is_dev_run


class PolicyExport(SelfPlayCallback):
    """Keeps ``policy/`` at the latest finished iteration, and ``best/`` at the best by held-out reward.

    Model, tokenizer, chat template, generation config; a policy with an adapter is written in PEFT's layout. A folder
    is replaced as a whole; its ``run.json`` says which iteration the policy comes out of (-1: the initial policy, where
    the run reverted to it), its fingerprint and, in ``best/``, its held-out reward with standard error. As long as no
    iteration is better than the initial policy, there is no ``best/``. Its reward was selected on those prompts: it
    is optimistic.

    Args:
        keep_every_iteration: also keep ``policies/000``, ``policies/001``, … one for each iteration.
    """

    def __init__(self, keep_every_iteration: bool = False) -> None:
        self.keep_every_iteration = keep_every_iteration

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back the folders that a killed run was about to replace."""
        run = RunFolder(Path(trainer.default_root_dir))
        if trainer.is_global_zero:
            for folder in (run.policy, run.best):
                restore_replaced(folder)

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Export the policy."""
        if is_dev_run(trainer):
            return
        folder, policy = data.folder, data.module.trained_policy
        standing = data.policy_after(iteration + 1)
        self.export(policy, folder.policy, iteration=standing - 1)
        if self.keep_every_iteration and standing == iteration + 1:
            self.export(policy, folder.kept_policy(iteration), iteration=iteration)
        if trainer.is_global_zero and best_finished(folder, iteration + 1) == standing == iteration + 1:
            self._copy_to_best(folder, iteration)

    def _copy_to_best(self, folder: RunFolder, iteration: int) -> None:
        """Let ``best/`` be what ``policy/`` is, the weights linked."""
        fresh = fresh_folder(folder.best, clear=True)
        shutil.copytree(folder.policy, fresh, copy_function=link_weights)
        record = json.loads((fresh / RECORD).read_bytes())
        results = held_out_results(folder, iteration + 1)
        result = next(item for item in results if item.finished == iteration + 1)
        record["held_out"] = {"reward": result.reward, "stderr": result.stderr}
        write_atomically(fresh / RECORD, json.dumps(record, indent=2).encode())
        replace_folder(folder.best, fresh)

    def export(self, policy: TrainedPolicy, folder: Path, *, iteration: int) -> None:
        """Write the policy into ``folder``, replacing what is there in one step; all processes call it together.

        Args:
            policy: to be written.
            folder: where to.
            iteration: self-play iteration that it comes out of; -1: the initial policy.
        """
        first = cast(Any, rank_zero_only).rank == 0
        fresh = fresh_folder(folder, clear=first)
        policy.save(fresh, is_rank0=first)
        record = {"iteration": iteration, "fingerprint": policy.current().fingerprint()}
        if not first:
            return
        write_atomically(fresh / RECORD, json.dumps(record, indent=2).encode())
        replace_folder(folder, fresh)
