"""Where `fit` stands between its epochs, and where a resumed one starts."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import lightning.pytorch as pl


class FitPosition(NamedTuple):
    """Where ``fit`` stands between its epochs."""

    epoch: int  # the Trainer's current epoch
    trained: int  # epochs whose batches are all done
    inside: bool  # whether an epoch has begun and its batches are not all done

    @property
    def epoch_is_over(self) -> bool:
        """Whether the current epoch's batches are done."""
        return self.trained > self.epoch


def fit_position(trainer: pl.Trainer) -> FitPosition:
    """Return where ``fit`` stands."""
    progress = cast(Any, trainer.fit_loop.epoch_progress.current)
    return FitPosition(
        epoch=trainer.current_epoch,
        trained=int(progress.processed),
        inside=bool(progress.started > progress.processed),
    )


def restore_position(trainer: pl.Trainer, epoch: int, *, only_its_end: bool) -> None:
    """Put a Trainer that has read a checkpoint between two epochs, whatever the checkpoint was saved in.

    Lightning counts micro-batches, whose number changes with that of the processes, and passes over an evaluation that
    was under way. Here the data module knows how far the epoch has come, and hands out the rest of it as an epoch.

    Args:
        trainer: in ``fit``, its loops' state read.
        epoch: that comes next.
        only_its_end: all of its optimizer steps have been taken.
    """
    loop = trainer.fit_loop
    loop.restarting = False
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        vars(progress).update(ready=epoch, started=epoch, processed=epoch, completed=epoch)
    loop.epoch_loop.batch_progress.reset()
    # the number under which loggers get what comes next; Lightning adds an epoch's last step after its evaluation
    loop.epoch_loop._batches_that_stepped = trainer.global_step - only_its_end
