"""Shows a few held-out answers, before and after training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.evaluation.held_out import load_evaluation
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.text import for_markdown
from sppo_lightning.types import Rollout


class SampleTable(SelfPlayCallback):
    """Writes ``samples.md`` after each evaluation, and shows it in TensorBoard.

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
        text = self.render(before[: self.prompts], after, finished)
        write_atomically(data.folder.samples, text.encode())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, trainer.global_step)

    def render(self, before: Sequence[Rollout], after: Sequence[Rollout], finished: int) -> str:
        """Return a Markdown table of the prompts in ``before``."""
        now = {row.prompt_id: row for row in after}
        lines = [
            f"| prompt | initial policy | reward | after {finished} iteration(s) | reward |",
            "|---|---|---|---|---|",
        ]
        for row in before:
            new = now.get(row.prompt_id)
            if new is not None:
                texts = [self._cell(text) for text in (row.prompt, row.response, new.response)]
                lines.append(
                    f"| {texts[0]} | {texts[1]} | {row.reward:.3f} | {texts[2]} | {new.reward:.3f} |"
                )
        return "\n".join(lines) + "\n"

    def _cell(self, text: str) -> str:
        flat = " ".join(text.split())
        cut = flat if len(flat) <= self.max_characters else flat[: self.max_characters - 1] + "…"
        return for_markdown(cut)
