"""Decides which prompts' difficulty to estimate again before the next iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.difficulty import Reestimation
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.seeding import random_keys
from sppo_lightning.types import UserError


class DifficultyReestimation(SelfPlayCallback):
    """Records, at an iteration's end, which prompts are due and how old and new estimates merge.

    The samples are taken by the data module at the next iteration's start, from the weights that the
    checkpoint holds. Prompts without an estimate are probed whatever this says.

    Args:
        every_n_iterations: self-play iterations between two re-estimations.
        prompts: ``all`` prompts with an estimate, or those ``selected`` in the iteration that ends.
        share: random share of them, in (0, 1]. With ``all``, the estimates of the other prompts move with the mean
            change of those, so that fresh and earlier ones can be ranked together.
        samples: responses for each; ``None``: ``data.probe_samples``, which prompts without an estimate get always.
        smoothing: weight of the old estimate, in [0, 1); 0 replaces it.
    """

    def __init__(
        self,
        every_n_iterations: int = 1,
        prompts: Literal["all", "selected"] = "all",
        share: float = 1.0,
        samples: int | None = None,
        smoothing: float = 0.0,
    ) -> None:
        if every_n_iterations < 1:
            raise ValueError(
                f"DifficultyReestimation.every_n_iterations={every_n_iterations} must be at least 1"
            )
        if not 0 < share <= 1:
            raise ValueError(f"DifficultyReestimation.share={share} must lie in (0, 1]")
        if samples is not None and samples < 1:
            raise ValueError(f"DifficultyReestimation.samples={samples} must be at least 1")
        if not 0 <= smoothing < 1:
            raise ValueError(f"DifficultyReestimation.smoothing={smoothing} must lie in [0, 1)")
        self.every_n_iterations = every_n_iterations
        self.prompts = prompts
        self.share = share
        self.samples = samples
        self.smoothing = smoothing

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Require the data module that owns the difficulty table, and samples enough for its reward."""
        if stage != "fit":
            return
        datamodule = self_play_data(trainer)
        self._say_if_useless(datamodule)
        wanted = datamodule.rules.samples_per_prompt
        if datamodule.reward.comparative and self.samples is not None and self.samples < wanted:
            raise UserError(
                f"DifficultyReestimation.samples={self.samples}: data.reward {type(datamodule.reward).__name__} "
                f"compares a prompt's responses with each other, so that all {wanted} have to be there at once"
            )

    def _say_if_useless(self, data: SelfPlayDataModule) -> None:
        """Say it if no prompt is a candidate twice, so that there is never an estimate to make again."""
        rules, ids = data.rules, data.prompt_sets.read("prompts").ids
        schedule = type(rules.schedule).__name__
        seen: set[str] = set()
        for iteration in range(rules.iterations):
            candidates = rules.schedule.candidates(
                ids, iteration=iteration, iterations=rules.iterations, seed=rules.seed
            )
            if not seen.isdisjoint(candidates):
                return
            seen.update(candidates)
        rank_zero_info(
            f"DifficultyReestimation has nothing to do: data.schedule {schedule} gives each prompt to one iteration, "
            "so that no difficulty is ever estimated again."
        )

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Hand the decision to the data module."""
        table, selected = data.folder.iteration(iteration).read_difficulty()
        data.reestimation = self.decide(table.prompt_ids, selected, iteration=iteration, rules=data.rules)

    def decide(
        self, known: Sequence[str], selected: set[str], *, iteration: int, rules: IterationRules
    ) -> Reestimation:
        """Return the decision for iteration ``iteration + 1``."""
        samples = self.samples or rules.probe_samples
        if (iteration + 1) % self.every_n_iterations:
            return Reestimation((), samples, self.smoothing)
        pool = [prompt_id for prompt_id in known if self.prompts == "all" or prompt_id in selected]
        keys = random_keys(pool, rules.seed, iteration, "reestimation").tolist()
        due = tuple(prompt_id for prompt_id, key in zip(pool, keys, strict=True) if key < self.share)
        return Reestimation(due, samples, self.smoothing, at_random=self.prompts == "all" and self.share < 1)
