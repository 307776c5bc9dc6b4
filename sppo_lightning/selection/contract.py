"""What a rule about prompts or pairs is asked, may keep, and may be told. Shapes: P prompts, or pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable


class Rule:
    """What a rule reads, and what it may keep from one iteration to the next.

    What it keeps goes into checkpoints and manifests: a run that is resumed, or makes an iteration's data again, gives
    a rule the state that it had before.

    ``requires`` names the columns that the rule reads, and ``responses`` or ``history`` if it asks for them; a slot
    that lacks one refuses the rule at start. ``prompt_fields`` names the keys of the prompt file that it reads through
    ``metadata``; a prompt without one is an error at start.
    """

    requires: tuple[str, ...] = ()
    prompt_fields: tuple[str, ...] = ()

    def setup(self, prompts: StatisticsTable) -> None:
        """Take in the training prompts; called once, at the start of a run, resumed or not, before any question.

        What is learned here is no part of the state.

        Args:
            prompts: a row a prompt, without columns; ``metadata`` has the ``prompt_fields``.
        """

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Learn from an iteration's probe; called once an iteration, when it is complete, before the selection.

        A call has to be deterministic: an iteration that was interrupted is observed again, from the state before.

        Args:
            table: all prompts with a known difficulty, with the columns of ``data.selection``, ``responses``,
                ``history`` and ``metadata``; ``estimated_iteration`` says which were probed in this iteration.
            iteration: self-play iteration, from 0.
        """

    def metrics(self) -> dict[str, float]:
        """Return what the loggers get once an iteration is observed, under ``iteration/<key of data>/``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule knows, in JSON types: text keys, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, in this process or in an earlier one."""


class Schedule(Rule, ABC):
    """Chooses an iteration's candidate prompts.

    Before a run it is asked about all iterations, to see whether they have prompts enough; a question changes nothing.
    """

    @abstractmethod
    def candidates(
        self, prompt_ids: Sequence[str], *, iteration: int, iterations: int, seed: int
    ) -> list[str]:
        """Return the candidates among ``prompt_ids``, in the order of ``prompt_ids``."""


class Selection(Rule, ABC):
    """Chooses prompts, or pairs, from a table of statistics."""

    @abstractmethod
    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return a bool mask ``[P]``, true where a row is kept.

        Args:
            table: ``data.selection`` gets :data:`~sppo_lightning.difficulty.DIFFICULTY_COLUMNS`, and
                ``table.responses`` and ``table.history`` when it asks for them; ``data.pair_selection`` gets
                :data:`~sppo_lightning.pairing.PAIR_COLUMNS`, a row a pair. Both have ``table.metadata``.
            iteration: self-play iteration, from 0.
            seed: the run's seed.
        """

    def size(self, total: int, *, iteration: int) -> int | None:
        """Return how many of ``total`` rows the rule keeps, or ``None`` if it depends on the values."""
        return None


class Curriculum(Rule, ABC):
    """Orders the pairs inside an iteration; it is asked for all epochs in turn, before the first one."""

    @abstractmethod
    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return row numbers ``[P]`` in training order.

        Args:
            difficulty: ``[P]`` mean reward of each pair's prompt; low = difficult.
            keys: ``[P]`` random keys of (seed, epoch, prompt id, number of the prompt's pair), for shuffling and ties.
        """
