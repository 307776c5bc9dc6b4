"""A reward that compares a prompt's responses with each other, and the contract of who compares them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from sppo_lightning.rewards.protocol import Reward, RewardMemory, Scores
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import SPEED_OR_PLACE, Prompt, UserError

TIE = 0.5

JudgeFunction = Callable[[str, str, str], float]


class Comparison(NamedTuple):
    """Two different responses to one prompt, in the order in which they are shown."""

    prompt: Prompt
    first: str
    second: str


class Judge(ABC):
    """Says which of two responses is better; chosen in the config by ``class_path``.

    A subclass needs :meth:`compare` only.
    """

    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE
    """Arguments of the constructor that decide speed or place, never an answer: a run that resumes may change them."""

    remote: ClassVar[bool] = False
    """Whether comparing is done on a server: it then runs in a thread, while responses are sampled here."""

    @abstractmethod
    def compare(self, comparisons: Sequence[Comparison]) -> Sequence[float]:
        """Return P(``first`` beats ``second``) for each comparison, in [0, 1]; NaN where it cannot say."""

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the judge cannot work; called before any model loads."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if a prompt lacks what the judge needs."""

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Return what comparing will take of ``device``, before anything loads.

        Args:
            device: where the judge is going to be loaded.
            tokens: of the longest conversation.
        """
        return RewardMemory()

    def load(self, device: torch.device) -> None:
        """Take up what comparing needs."""

    def unload(self) -> None:
        """Leave the device to others."""


class FunctionJudge(Judge):
    """Compares with ``function(prompt, first, second) -> P(first beats second)``.

    Args:
        function: dotted path of the function. It gets the prompt's text and two responses.
    """

    def __init__(self, function: JudgeFunction) -> None:
        self.function = function

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """Call the function once a comparison."""
        return [self.function(prompt.text, first, second) for prompt, first, second in comparisons]


class PairwiseReward(Reward):
    """Scores a response with its mean win probability against other responses to the same prompt.

    The reward of SPPO (arXiv 2405.00675), in [0, 1]. An unordered pair is judged once, in an order of presentation
    that depends on the prompt and the two texts only: P(b beats a) = 1 - P(a beats b). Identical texts tie without
    being judged. A comparison that the judge cannot make is left out of the mean; its share of a response's
    comparisons is the part ``unjudged``. A response none of whose comparisons was made is dropped as
    ``no_judgement``, the only response to a prompt as ``no_opponent``.

    Args:
        judge: compares two responses.
        opponents: drawn for each response, which also meets those that drew it; ``None``: all others.
    """

    comparative = True
    gives_win_probabilities = True

    def __init__(self, judge: Judge, opponents: int | None = None) -> None:
        if opponents is not None and opponents < 1:
            raise ValueError(
                f"PairwiseReward.opponents={opponents} must be at least 1, or null for all others"
            )
        self.judge = judge
        self.opponents = opponents

    @property
    def remote(self) -> bool:
        """Whether the judge is on a server."""
        return self.judge.remote

    def check(self) -> None:
        """Check the judge."""
        self.judge.check()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check the prompts that the judge will see."""
        self.judge.check_prompts(prompts)

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Return what the judge takes."""
        return self.judge.memory(device, tokens)

    def load(self, device: torch.device) -> None:
        """Load the judge."""
        self.judge.load(device)

    def unload(self) -> None:
        """Unload the judge."""
        self.judge.unload()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Hold one tournament a prompt; the judge gets all comparisons of the call at once."""
        opponents = self._drawn([prompt.id for prompt in prompts])
        comparisons: dict[tuple[str, str, str], Comparison] = {}
        for row, others in enumerate(opponents):
            for other in others:
                if responses[row] != responses[other]:
                    shown = presented(prompts[row].id, responses[row], responses[other])
                    key = (prompts[row].id, *shown)
                    comparisons[key] = Comparison(prompts[row], *shown)
        judged = dict(zip(comparisons, self._judged(list(comparisons.values())), strict=True))
        rewards, unjudged = [], []
        reasons: dict[int, str] = {}
        for row, others in enumerate(opponents):
            wins = [
                win_probability(judged, prompts[row].id, responses[row], responses[other]) for other in others
            ]
            known = [win for win in wins if not math.isnan(win)]
            if not known:
                reasons[row] = "no_judgement" if others else "no_opponent"
            # exact summation, so that the order of the responses changes no reward
            rewards.append(math.fsum(known) / len(known) if known else math.nan)
            unjudged.append(1 - len(known) / len(wins) if wins else math.nan)
        return Scores(rewards, reasons, {"unjudged": unjudged})

    def _drawn(self, prompt_ids: Sequence[str]) -> list[set[int]]:
        """Return the rows that each row meets: those it drew, and those that drew it."""
        rows_of: dict[str, list[int]] = {}
        for row, prompt_id in enumerate(prompt_ids):
            rows_of.setdefault(prompt_id, []).append(row)
        met: list[set[int]] = [set() for _ in prompt_ids]
        for prompt_id, rows in rows_of.items():
            for place, row in enumerate(rows):
                for other in drawn_opponents(prompt_id, place, len(rows), self.opponents):
                    met[row].add(rows[other])
                    met[rows[other]].add(row)
        return met

    def _judged(self, comparisons: Sequence[Comparison]) -> list[float]:
        if not comparisons:
            return []
        name = f"data.reward judge {type(self.judge).__name__}"
        found = self.judge.compare(comparisons)
        try:
            answers = list(found)
        except TypeError as error:
            raise UserError(
                f"{name} returned a {type(found).__name__}: it must return a list of probabilities"
            ) from error
        if len(answers) != len(comparisons):
            raise UserError(
                f"{name} returned {len(answers)} answers to {len(comparisons)} comparisons: it must return one for each"
            )
        return [_probability(answer, name) for answer in answers]


def drawn_opponents(prompt_id: str, place: int, count: int, opponents: int | None) -> list[int]:
    """Return the opponents that one of a prompt's ``count`` responses draws, by place among them."""
    others = [other for other in range(count) if other != place]
    if opponents is None or opponents >= len(others):
        return others
    return sorted(others, key=lambda other: derive_seed("opponent", prompt_id, place, other))[:opponents]


def presented(prompt_id: str, one: str, two: str) -> tuple[str, str]:
    """Return two texts in the order in which a judge sees them, whichever comes first here."""
    low, high = sorted((one, two))
    return (high, low) if derive_seed("presentation", prompt_id, low, high) % 2 else (low, high)


def win_probability(
    judged: Mapping[tuple[str, str, str], float], prompt_id: str, response: str, other: str
) -> float:
    """Return P(``response`` beats ``other``), given P(first beats second) by prompt id, first and second text."""
    if response == other:
        return TIE
    first, second = presented(prompt_id, response, other)
    first_wins = judged[(prompt_id, first, second)]
    return first_wins if first == response else 1 - first_wins


def _probability(answer: Any, name: str) -> float:
    if answer is None:
        return math.nan
    try:
        number = math.inf if isinstance(answer, str) else float(answer)
    except (TypeError, ValueError):
        number = math.inf
    if math.isnan(number) or 0 <= number <= 1:
        return number
    raise UserError(f"{name} returned {answer!r}: it must return probabilities from 0 to 1, or NaN")
