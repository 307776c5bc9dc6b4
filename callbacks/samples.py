"""Shows a few held-out answers, before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.loggers.media import Rows, markdown_table, media_of
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import Rollout

COLUMNS = ("prompt", "initial_response", "initial_reward", "response", "reward")


class SampleTable(SelfPlayCallback):
    """Writes ``samples.md`` after each evaluation, and gives the same table to the loggers that show tables.

    Args:
        prompts: held-out prompts in the table.
        max_characters: longer texts are cut in the table.
    """

    def __init__(self, prompts: int = 8, max_characters: int = 300) -> None:
        if prompts < 1:
            raise ValueError(f"SampleTable.prompts={prompts} must be at least 1")
        if max_characters < 1:
            raise ValueError(f"SampleTable.max_characters={max_characters} must be at least 1")
        self.prompts = prompts
        self.max_characters = max_characters

    @rank_zero_only
    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Write the table."""
        if not data.prompt_sets.named("eval_prompts"):
            return
        finished = iteration + 1
        before = load_evaluation(data.folder.evaluation("000"))
        after = load_evaluation(data.folder.evaluation(f"{finished:03d}"))
        if before is None or after is None:
            return
        rows = self.rows(before[: self.prompts], after)
        write_atomically(data.folder.samples, self.render(rows, finished).encode())
        for media in map(media_of, trainer.loggers):
            if media is not None:
                media.log_table("samples", COLUMNS, rows, trainer.global_step)

    def rows(self, before: Sequence[Rollout], after: Sequence[Rollout]) -> Rows:
        """Return a row of :data:`COLUMNS` for each prompt in ``before`` that has an answer in ``after``."""
        now = {row.prompt_id: row for row in after}
        both = [(row, now[row.prompt_id]) for row in before if row.prompt_id in now]
        return [
            (
                self._cut(row.prompt),
                self._cut(row.response),
                _number(row.reward),
                self._cut(new.response),
                _number(new.reward),
            )
            for row, new in both
        ]

    def render(self, rows: Rows, finished: int) -> str:
        """Return the rows as a Markdown table."""
        headings = ("prompt", "initial policy", "reward", f"after {finished} iteration(s)", "reward")
        return markdown_table(headings, rows)

    def _cut(self, text: str) -> str:
        flat = " ".join(text.split())
        return flat if len(flat) <= self.max_characters else flat[: self.max_characters - 1] + "…"


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
