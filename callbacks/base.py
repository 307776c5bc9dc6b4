"""What the callbacks of the loop share: hooks between Lightning's, on the loop's own clock."""

from __future__ import annotations

import lightning.pytorch as pl

from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.types import PhaseProgress


class SelfPlayCallback(pl.Callback):
    """A callback of the self-play loop; a subclass overrides one of the hooks, or any of Lightning's.

    One that overrides ``on_train_epoch_end`` calls ``super().on_train_epoch_end(...)``.
    """

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Called when a phase starts (``done == 0``), advances and ends (``done == total``), on every process."""

    def on_sampling_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        """Called several times a second while a batch is sampled: ``progress.under_way`` and tokens grow."""

    def on_iteration_start(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Called before an iteration samples anything, on every process; not where a run resumes inside of one.

        Args:
            trainer: at the start of the iteration's first epoch.
            data: its settings and folder.
            iteration: the self-play iteration that starts, from 0.
        """

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Called once an iteration is trained and evaluated, before the next one samples, on every process.

        Args:
            trainer: at the end of the iteration's last epoch.
            data: its settings, folder, pairs and difficulties.
            iteration: the self-play iteration that ends, from 0.
        """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call :meth:`on_iteration_end` where an epoch is an iteration's last."""
        data = self_play_data(trainer)
        if data.iteration_ends:
            self.on_iteration_end(trainer, data, data.current_iteration)
