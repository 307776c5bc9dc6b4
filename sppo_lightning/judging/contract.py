"""What an annotator is: who says which of two answers is better."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import SPEED_OR_PLACE, Prompt

UNANSWERED = frozenset({"server_error", "server_time_out", "malformed_answer"})
"""Reasons of a verdict that may be another one when it is asked for again."""


class Answer(NamedTuple):
    """An answer to one prompt."""

    prompt: Prompt
    text: str
    reward: float | None = None  # that a run has stored, NaN where scoring failed; ``None``: there is none


@dataclass(frozen=True)
class AnswerSet:
    """Answers of one policy or file, in their order there.

    Args:
        name: of who answered, for people and in annotations.
        source: as the user named it.
        answers: one a prompt.
        run: the run's folder, of a run's held-out answers.
        settings: the run's config.
    """

    name: str
    source: str
    answers: Sequence[Answer]
    run: RunFolder | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Shown(NamedTuple):
    """Two answers to one prompt, in the order in which they are shown."""

    prompt: Prompt
    first: Answer
    second: Answer


class Verdict(NamedTuple):
    """What was said of two answers, in the order in which they were shown."""

    first_wins: float  # P(the first is better), in [0, 1]; 0.5: a tie; NaN: not known
    reason: str = ""  # why it is not known, e.g. ``unknown_answer``
    said: str = ""  # the judge's own words
    logprobs: Mapping[str, float] = MappingProxyType({})  # of tokens that the verdict was read from, nats
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_final(self) -> bool:
        """Whether asking again would give the same."""
        return not math.isnan(self.first_wins) or self.reason not in UNANSWERED


class Annotator(ABC):
    """Says which of two answers is better; chosen by ``--by``. A subclass needs :meth:`judge` only.

    Attributes:
        name: short, in the folder's name and in annotations; empty: the class's.
        both_orders: whether the order in which answers are shown may matter, so that each pair is shown in both.
        keeps_verdicts: whether each verdict goes to disk as it comes, to be taken up by a command that is given again.
    """

    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE
    """Arguments of the constructor that decide speed or place, never a verdict: a command that continues may change
    them."""
    name: str = ""
    both_orders: bool = True
    keeps_verdicts: bool = True

    def prepare(self, judged: AnswerSet, others: AnswerSet) -> tuple[AnswerSet, AnswerSet]:
        """Return the sets as they are to be compared; called before all else.

        Args:
            judged: whose win rate is wanted.
            others: whom it is compared with.

        Raises:
            UserError: if they cannot be compared.
        """
        return judged, others

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if nothing can be judged; called where something is to be."""

    @abstractmethod
    def judge(self, comparisons: Sequence[Shown]) -> Iterator[tuple[int, Verdict]]:
        """Yield the position of each comparison and its verdict, as they come."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return what so many tokens cost; ``None``: not known."""
        return None
