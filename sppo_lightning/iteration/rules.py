"""The scientific settings of an iteration, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS
from sppo_lightning.pairing import PAIR_COLUMNS, Pairing
from sppo_lightning.selection import Schedule, Selection


@dataclass(frozen=True)
class IterationRules:
    """The scientific settings of an iteration; see :class:`~sppo_lightning.datamodule.SelfPlayDataModule`."""

    iterations: int
    samples_per_prompt: int
    probe_samples: int
    pairs_per_step: int
    batch_size: int
    schedule: Schedule
    selection: Selection
    pairing: Pairing
    pair_selection: Selection
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"data.samples_per_prompt={self.samples_per_prompt}: a pair needs at least 2 responses"
            )
        for name in ("iterations", "probe_samples", "pairs_per_step", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        slots = (
            ("selection", self.selection, DIFFICULTY_COLUMNS),
            ("pair_selection", self.pair_selection, PAIR_COLUMNS),
        )
        for slot, rule, columns in slots:
            missing = [name for name in rule.requires if name not in columns]
            if missing:
                raise ValueError(
                    f"data.{slot}: {type(rule).__name__} needs the column {missing[0]!r}, which is not there; "
                    f"this slot has {', '.join(columns)}"
                )

    def expected_pairs(self, prompt_ids: Sequence[str], iteration: int) -> tuple[int, int]:
        """Return how many candidate prompts an iteration has, and the most pairs that it may get from them."""
        candidates = self.schedule.candidates(
            prompt_ids, iteration=iteration, iterations=self.iterations, seed=self.seed
        )
        size = len(candidates)
        for rule in (self.selection, self.pair_selection):
            kept = rule.size(size, iteration=iteration)
            size = size if kept is None else kept
        return len(candidates), size
