"""The scientific settings of an iteration, checked against each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sppo_lightning.difficulty import DIFFICULTY_COLUMNS, StatisticsTable
from sppo_lightning.pairing import PAIR_COLUMNS, Pairing
from sppo_lightning.selection import Curriculum, RandomOrder, Rule, Schedule, Selection
from sppo_lightning.types import UserError


@dataclass(frozen=True)
class IterationRules:
    """The scientific settings of an iteration; see :class:`~sppo_lightning.datamodule.SelfPlayDataModule`.

    ``fresh_states`` is what the rules knew when these settings were made, before any iteration.
    """

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
    curriculum: Curriculum = field(default_factory=RandomOrder)
    steps_per_iteration: int | None = None
    fresh_states: Mapping[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"data.samples_per_prompt={self.samples_per_prompt}: a pair needs at least 2 responses"
            )
        for name in ("iterations", "probe_samples", "pairs_per_step", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.steps_per_iteration is not None and self.steps_per_iteration < 1:
            raise ValueError(f"data.steps_per_iteration={self.steps_per_iteration} must be at least 1")
        for slot, rule in self.keeping.items():
            columns = (
                PAIR_COLUMNS if slot == "pair_selection" else (*DIFFICULTY_COLUMNS, "responses", "history")
            )
            missing = [name for name in rule.requires if name not in columns]
            if missing:
                raise ValueError(
                    f"data.{slot}: {type(rule).__name__} needs the column {missing[0]!r}, which is not there; "
                    f"this slot has {', '.join(columns)}"
                )

        name = f"data.pairing: {type(self.pairing).__name__}"
        if not hasattr(self.pairing, "choose") and type(self.pairing).pairs is Pairing.pairs:
            raise ValueError(
                f"{name} must define choose(rewards, generator), for one pair of a prompt, or pairs(responses, "
                "generator), for several"
            )
        if self.pairing.most_pairs < 1:
            raise ValueError(f"{name}.most_pairs={self.pairing.most_pairs} must be at least 1")
        object.__setattr__(self, "fresh_states", self.state_dict())

    @property
    def pairs_per_iteration(self) -> int | None:
        """Pairs that an iteration trains on, repeated ones included; ``None``: all that it has, once an epoch."""
        return None if self.steps_per_iteration is None else self.steps_per_iteration * self.pairs_per_step

    @property
    def most_pairs(self) -> int:
        """The most pairs that one prompt may give."""
        samples = self.samples_per_prompt
        return min(self.pairing.most_pairs, samples * (samples - 1) // 2)

    @property
    def keeping(self) -> dict[str, Rule]:
        """The rules that may keep a state, by the key of ``data`` that they come from."""
        return {
            "schedule": self.schedule,
            "selection": self.selection,
            "pair_selection": self.pair_selection,
            "curriculum": self.curriculum,
        }

    def setup(self, prompts: StatisticsTable) -> None:
        """Let the rules take in the training prompts.

        Args:
            prompts: a row a prompt, without columns, with metadata.
        """
        for rule in self.keeping.values():
            rule.setup(prompts)

    def observe(self, table: StatisticsTable, *, iteration: int) -> dict[str, float]:
        """Let the rules learn from an iteration's probe, and return what they log of it.

        Args:
            table: all prompts with a known difficulty.
            iteration: self-play iteration.
        """
        for rule in self.keeping.values():
            rule.observe(table, iteration=iteration)
        return {
            f"iteration/{slot}/{name}": value
            for slot, rule in self.keeping.items()
            for name, value in rule.metrics().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what each rule knows, as it comes back from JSON.

        Raises:
            UserError: if a rule's state is nothing that JSON can hold.
        """
        return {slot: _as_json(slot, rule) for slot, rule in self.keeping.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Let the rules take up what :meth:`state_dict` returned."""
        for slot, rule in self.keeping.items():
            if slot in states:
                rule.load_state_dict(copy.deepcopy(states[slot]))

    def expected_pairs(self, prompt_ids: Sequence[str], iteration: int, *, each: int) -> tuple[int, int]:
        """Return how many candidate prompts an iteration has, and the most pairs that it may get from them.

        Args:
            prompt_ids: of all prompts.
            iteration: self-play iteration.
            each: pairs that a selected prompt gives.
        """
        candidates = self.schedule.candidates(
            prompt_ids, iteration=iteration, iterations=self.iterations, seed=self.seed
        )
        size = len(candidates)
        for rule, factor in ((self.selection, each), (self.pair_selection, 1)):
            kept = rule.size(size, iteration=iteration)
            size = factor * (size if kept is None else kept)
        return len(candidates), size


def _as_json(slot: str, rule: Rule) -> Any:
    try:
        return json.loads(json.dumps(rule.state_dict()))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.{slot}: {type(rule).__name__}.state_dict() returned something that JSON cannot hold ({error}): "
            "return dicts with text keys, lists, texts and numbers"
        ) from error
