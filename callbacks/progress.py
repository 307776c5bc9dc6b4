"""Shows what a run is doing: phase, prompts done, tokens a second, time left."""

from __future__ import annotations

import sys
from typing import Any

import huggingface_hub.utils
import lightning.pytorch as pl
import transformers.utils.logging
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.types import PhaseProgress

SECONDS_BETWEEN_LINES = 10.0  # where the output is a file


class SelfPlayProgress(SelfPlayCallback, ProgressBar):
    """One bar a phase: evaluating, probing, generating, scoring, reference, training.

    On a terminal the bar moves in place; in a file a line is written every few seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._shown: float = 0

    def disable(self) -> None:
        """Stay silent (all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show bars again."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the bars of what is loaded and saved between two phases out."""
        super().setup(trainer, pl_module, stage)
        transformers.utils.logging.disable_progress_bar()  # models are loaded and saved between two of our bars
        huggingface_hub.utils.enable_progress_bars()  # downloads stay visible

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the last bar."""
        self._close()

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Show a phase between two training phases."""
        if progress.done == 0:
            unit = "pair" if progress.phase == "reference" else "prompt"
            self._open(f"iteration {progress.iteration} {progress.phase}", progress.total, unit)
        self._advance(progress.done, progress.tokens)
        if progress.done == progress.total:
            self._close()

    def on_sampling_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Move the bar inside of a batch."""
        self._advance(round(progress.done + progress.under_way, 1), progress.tokens)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of a training epoch."""
        datamodule = self_play_data(trainer)
        epoch = trainer.current_epoch % datamodule.epochs_per_iteration
        name = f"iteration {datamodule.current_iteration} training"
        if datamodule.epochs_per_iteration > 1:
            name += f" (epoch {epoch})"
        self._open(name, len(datamodule.pairs), "pair")
        self._trained = self._tokens = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch | None,
        batch_idx: int,
    ) -> None:
        """Advance the training bar."""
        if batch is None:  # a resumed run whose epoch has no step left
            return
        self._trained += int(batch.weights.shape[0]) * trainer.world_size
        self._tokens += batch.rows.input_ids.numel() * trainer.world_size
        self._advance(self._trained, self._tokens)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the training bar."""
        self._close()
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that what is said next stands on a line of its own."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the training bar before an evaluation."""
        self._close()

    def _open(self, name: str, total: int, unit: str) -> None:
        self._close()
        if self._enabled:
            live = sys.stderr.isatty()
            self._bar = tqdm(
                total=total,
                desc=f"{name:<24}",
                unit=unit,
                file=sys.stderr,
                dynamic_ncols=live,
                ncols=None if live else 110,
                mininterval=0.2 if live else SECONDS_BETWEEN_LINES,
                leave=True,
                miniters=0,
                smoothing=0,  # the time left by the mean speed so far: batches are few and unlike each other
            )
            self._shown = 0

    def _advance(self, done: float, tokens: int) -> None:
        if self._bar is not None:
            done = min(max(done, self._shown), self._bar.total)
            elapsed = max(self._bar.format_dict["elapsed"], 1e-3)
            self._bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
            self._bar.n = self._shown = int(done) if done == int(done) else done
            self._bar.update(0)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
