"""Writes the report of a run at each iteration's end."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.report.command import MAX_MEGABYTES, categories_of, page_of
from sppo_lightning.report.run_data import read_run
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.training.hardware import is_dev_run
from sppo_lightning.types import first_line


class ReportFile(SelfPlayCallback):
    """Writes ``report.html`` when an iteration ends: what happened so far, with all prompts and responses.

    The same as ``sppo-lightning report``. A report that cannot be written is warned about, and the run goes on: a full
    disk is found by what writes the data that a run needs.

    Args:
        every_n_iterations: self-play iterations between two reports; the last one is always written. 0: none.
        max_megabytes: size of the file; responses that would make it larger are left out, those of the oldest
            iterations first.
        category_field: field of a training prompt that holds its category.
    """

    def __init__(
        self,
        every_n_iterations: int = 1,
        max_megabytes: float = MAX_MEGABYTES,
        category_field: str = "category",
    ) -> None:
        if every_n_iterations < 0:
            raise ValueError(f"ReportFile.every_n_iterations={every_n_iterations} must be 0 or more")
        if not max_megabytes > 0:
            raise ValueError(f"ReportFile.max_megabytes={max_megabytes} must be more than 0")
        self.every_n_iterations = every_n_iterations
        self.max_megabytes = max_megabytes
        self.category_field = category_field

    @rank_zero_only
    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Write the report, if it is due."""
        finished = iteration + 1
        due = self.every_n_iterations and (
            finished % self.every_n_iterations == 0 or finished == data.rules.iterations
        )
        if not due or is_dev_run(trainer):
            return
        try:
            run = read_run(data.folder.root)
            categories = categories_of(data.prompt_sets.read("prompts"), self.category_field)
            content = page_of([run], max_megabytes=self.max_megabytes, categories=categories)
            write_atomically(data.folder.report, content)
        except Exception as error:
            rank_zero_warn(
                f"{data.folder.report} could not be written ({first_line(error)}): the run goes on."
            )
