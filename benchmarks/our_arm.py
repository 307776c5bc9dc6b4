"""The arms of ``train_step.py`` that are this package: ``PreferenceModule`` in a Lightning ``Trainer.fit``."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import workload
from arms import Rounds
from gate import FirstStep
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from workload import TokenPair

from sppo_lightning.losses import DPOLoss, PairLogps, PreferenceLoss, PreferenceTerms
from sppo_lightning.module import PreferenceModule
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward
from sppo_lightning.pair_forward.logprobs import summed
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.training.batching import PairDataset, StepSampler
from sppo_lightning.types import PreferencePair


@dataclass(frozen=True)
class OurSetting:
    """What one of our arms is made of."""

    pair_forward: Callable[[], PairForward] = AutoForward
    clip: float | None = None


SETTINGS = {
    "ours": OurSetting(),
    "ours-compiled": OurSetting(pair_forward=partial(AutoForward, compiled=True)),
    "ours-clipped": OurSetting(clip=1.0),
    "plain": OurSetting(pair_forward=PlainForward),
}


class StoredPairs(pl.LightningDataModule):
    """The pairs of a run without self-play; their reference log-probs are taken before the first step."""

    def __init__(self, settings: argparse.Namespace, pairs: list[TokenPair]) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = [PreferencePair(str(row), *pair, "", "", 1.0, 0.0) for row, pair in enumerate(pairs)]

    def train_dataloader(self) -> Any:
        """Return the loader of all steps."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        settings = self.settings
        workload.same_adapter(module.policy, settings.seed)
        layout = module.pair_layout(settings.prompt_tokens + settings.response_tokens)
        size = {"pairs_per_step": settings.pairs, "batch_size": settings.pairs}
        unknown = PairDataset(self.pairs, layout)
        with module.reference.held():
            known = [
                summed(module.reference.logps_by_token(unknown[micro]))
                for micro in StepSampler(range(len(self.pairs)), **size)
            ]
        chosen, rejected = (torch.cat(side).tolist() for side in zip(*known, strict=True))
        pairs = [
            replace(pair, reference_chosen_logp=one, reference_rejected_logp=other)
            for pair, one, other in zip(self.pairs, chosen, rejected, strict=True)
        ]
        order = workload.training_order(settings, len(pairs))
        return DataLoader(PairDataset(pairs, layout), sampler=StepSampler(order, **size), batch_size=None)

    def val_dataloader(self) -> list[Any]:
        """Return nothing."""
        return []


class Timed(pl.Callback):
    """Lets one optimizer step run whenever a round is asked for."""

    def __init__(self, rounds: Rounds, tokens: Callable[[int], int]) -> None:
        self.rounds = rounds
        self.tokens = tokens

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first round."""
        self.rounds.wait()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer, and wait for the next round."""
        self.rounds.report(self.tokens(batch_idx))
        self.rounds.wait()


class KeptStep(pl.Callback):
    """Keeps gradient and loss of a step."""

    def __init__(self, first: FirstStep) -> None:
        self.first = first

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradient."""
        module: Any = pl_module
        self.first.keep_gradient(module.policy)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss."""
        self.first.shared = batch.rows.shared is not None
        self.first.keep_loss(outputs["loss"])


class KeptLogps(PreferenceLoss):
    """A DPO loss that keeps the log-probs that it is given."""

    def __init__(self, first: FirstStep) -> None:
        self.first = first
        self.loss = DPOLoss(workload.BETA)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        """Return the loss."""
        self.first.keep_logps(policy.chosen, policy.rejected)
        return self.loss(policy, reference)


@contextlib.contextmanager
def random_weights(settings: argparse.Namespace) -> Iterator[str]:
    """Yield the folder of the model under test; of a shape, whose weights are made instead of read."""
    if settings.shape is None:
        yield settings.model
        return

    def make(*_: Any, dtype: torch.dtype, **__: Any) -> Any:
        return workload.random_model(settings, dtype)

    with tempfile.TemporaryDirectory() as name:
        workload.write_shape(settings, Path(name))
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", make):
            yield name


def train(
    settings: argparse.Namespace, arm: OurSetting, loss: PreferenceLoss, callback: pl.Callback, *, steps: int
) -> None:
    """Train.

    Args:
        settings: of the command line.
        arm: which of our arms.
        loss: the preference loss.
        callback: sees every step.
        steps: optimizer steps.
    """
    with random_weights(settings) as pretrained, tempfile.TemporaryDirectory() as folder:
        config = PolicyConfig(
            pretrained,
            lora=LoRAConfig(settings.lora_rank, alpha=2 * settings.lora_rank) if settings.lora_rank else None,
            gradient_checkpointing=settings.checkpointing,
            chat_template="plain",
        )
        module = PreferenceModule(
            config,
            loss,
            workload.LEARNING_RATE,
            reference="previous_iteration",
            pair_forward=arm.pair_forward(),
        )
        trainer = pl.Trainer(
            accelerator="gpu" if settings.device == "cuda" else settings.device,
            devices=1,
            precision=settings.precision,
            max_epochs=1,
            max_steps=steps,
            gradient_clip_val=arm.clip,
            default_root_dir=folder,
            logger=[
                TensorBoardLogger(save_dir=folder, name="", version="tensorboard"),
                MetricsCSV(Path(folder) / "metrics.csv"),
            ],
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=StoredPairs(settings, _pairs(settings)))


def _pairs(settings: argparse.Namespace) -> list[TokenPair]:
    return workload.token_pairs(settings, workload.model_config(settings).vocab_size)


def time_steps(settings: argparse.Namespace, rounds: Rounds, name: str) -> None:
    """Train one step a round."""
    pairs = _pairs(settings)
    timed = Timed(rounds, lambda step: workload.step_tokens(settings, pairs, step))
    train(settings, SETTINGS[name], DPOLoss(workload.BETA), timed, steps=workload.total_steps(settings))


def first_step(settings: argparse.Namespace, name: str) -> FirstStep:
    """Train one step and return what the gate compares."""
    first = FirstStep()
    unclipped = replace(SETTINGS[name], clip=None)
    train(settings, unclipped, KeptLogps(first), KeptStep(first), steps=1)
    return first
