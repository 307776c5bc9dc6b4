"""Show each pair of answers to an annotator, and make preferences of its verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sppo_lightning.evaluation.win_rate import TIE
from sppo_lightning.judging.contract import Annotator, Answer, Shown, Verdict
from sppo_lightning.judging.journal import Journal, digest_of
from sppo_lightning.types import Prompt


class Progress(NamedTuple):
    """How far the verdicts are."""

    done: int
    total: int
    prompt_tokens: int  # of all verdicts so far, earlier commands' too
    completion_tokens: int


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and what was said of them.

    Args:
        prompt: that both answer.
        answer: the judged one.
        other: the one that it is compared with.
        verdicts: on the answer against the other, and the other way round where both orders were shown; none of texts
            that are the same.
    """

    prompt: Prompt
    answer: Answer
    other: Answer
    verdicts: tuple[Verdict, ...] = ()

    @property
    def wins(self) -> tuple[float, ...]:
        """P(the answer is better) by each verdict; NaN: not known."""
        return tuple(
            1 - verdict.first_wins if swapped else verdict.first_wins
            for swapped, verdict in enumerate(self.verdicts)
        )

    @property
    def preference(self) -> float:
        """P(the answer is better), in [0, 1]: the mean over both orders, NaN where one of them is not known.

        One order alone would bring the judge's liking for a position back. Texts that are the same tie.
        """
        return sum(self.wins) / len(self.wins) if self.verdicts else TIE

    @property
    def orders_disagree(self) -> bool:
        """Whether the two orders have not the same winner; a tie in one of them only counts."""
        return len({(win > TIE) - (win < TIE) for win in self.wins}) > 1

    @property
    def reason(self) -> str:
        """Why there is no preference; empty if there is one."""
        return next((verdict.reason for verdict in self.verdicts if math.isnan(verdict.first_wins)), "")


def compare(
    annotator: Annotator,
    pairs: Sequence[Pair],
    journal: Journal | None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[Pair]:
    """Return the pairs with their verdicts.

    Args:
        annotator: who is asked.
        pairs: without verdicts.
        journal: has the verdicts of before, and gets each one as it comes; ``None``: nothing is kept.
        report: follows.

    Raises:
        UserError: if nobody can be asked, or an answer's place on disk is full.
    """
    shown = [
        order
        for pair in pairs
        if pair.answer.text != pair.other.text
        for order in _orders(pair, both=annotator.both_orders)
    ]
    known = {} if journal is None else journal.read()
    asked = {digest_of(one): one for one in shown}
    found = {digest: known[digest] for digest in asked if digest in known}
    missing = [one for digest, one in asked.items() if digest not in found]
    tokens = Counter(
        prompt=sum(verdict.prompt_tokens for verdict in found.values()),
        completion=sum(verdict.completion_tokens for verdict in found.values()),
    )
    report(Progress(len(found), len(asked), tokens["prompt"], tokens["completion"]))
    if missing:
        annotator.check()
        for position, verdict in annotator.judge(missing):
            if journal is not None and verdict.is_final:
                journal.append(missing[position], verdict)
            found[digest_of(missing[position])] = verdict
            tokens.update(prompt=verdict.prompt_tokens, completion=verdict.completion_tokens)
            report(Progress(len(found), len(asked), tokens["prompt"], tokens["completion"]))
    return [
        pair
        if pair.answer.text == pair.other.text
        else Pair(
            pair.prompt,
            pair.answer,
            pair.other,
            tuple(found[digest_of(order)] for order in _orders(pair, both=annotator.both_orders)),
        )
        for pair in pairs
    ]


def _orders(pair: Pair, *, both: bool) -> list[Shown]:
    orders = [Shown(pair.prompt, pair.answer, pair.other), Shown(pair.prompt, pair.other, pair.answer)]
    return orders if both else orders[:1]
