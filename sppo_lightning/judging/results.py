"""What comes of the verdicts: win rates for people and as JSON, and annotations as AlpacaEval reads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sppo_lightning.evaluation.length_controlled import (
    GamedBaselines,
    LengthControlledWinRate,
    has_scikit_learn,
    length_controlled_win_rate,
)
from sppo_lightning.evaluation.win_rate import COVERAGE, WinRate, win_rate
from sppo_lightning.judging.comparing import Pair


@dataclass(frozen=True)
class Results:
    """Figures of one comparison.

    Args:
        prompts: compared.
        win_rate: of the judged answers.
        length_controlled: the same at equal lengths; ``None`` without scikit-learn.
        lengths: mean characters of the judged answers, and of the others.
        order_disagreement: share of the prompts judged in both orders whose orders disagree; NaN: none was.
        no_preference: prompts without one, by reason.
        prompt_tokens: that the judge read.
        completion_tokens: that it wrote.
        cost: of these tokens; ``None``: not known.
    """

    prompts: int
    win_rate: WinRate
    length_controlled: LengthControlledWinRate | None
    lengths: tuple[float, float]
    order_disagreement: float
    no_preference: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None

    def lines(self) -> list[str]:
        """Return the figures in words."""
        rate, controlled = self.win_rate, self.length_controlled
        interval = f"{COVERAGE:.0%} bootstrap interval over prompts"
        found = [
            f"win rate           {_percent(rate.rate, rate.low, rate.high)}, {interval}: {rate.wins} won, "
            f"{rate.losses} lost, {rate.ties} tied"
        ]
        if controlled is None:
            found.append("length-controlled  not computed: pip install 'sppo-lightning[judge]'")
        elif math.isnan(controlled.rate):
            found.append("length-controlled  not computed: too few prompts have a preference")
        else:
            name = (
                controlled.name
                if controlled.stderr < 1e-9
                else f"{controlled.name}, ± {controlled.stderr:.1%}"
            )
            found.append(
                f"length-controlled  {_percent(controlled.rate, controlled.low, controlled.high)} ({name})"
            )
        found.append(f"mean length        {self.lengths[0]:,.0f} characters against {self.lengths[1]:,.0f}")
        if not math.isnan(self.order_disagreement):
            found.append(
                f"orders disagree    {self.order_disagreement:.1%} of the prompts judged in both orders"
            )
        if self.no_preference:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.no_preference.items()))
            found.append(
                f"no preference      {sum(self.no_preference.values())} of {self.prompts} prompts ({reasons})"
            )
        if self.prompt_tokens or self.completion_tokens:
            cost = "" if self.cost is None else f"; cost {self.cost:,.4f}"
            found.append(
                f"judge's tokens     {self.prompt_tokens:,} read, {self.completion_tokens:,} written{cost}"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the figures, of JSON's own types; what is not known is null."""
        controlled = self.length_controlled
        return {
            "prompts": self.prompts,
            "win_rate": _known(self.win_rate._asdict()),
            "length_controlled": None if controlled is None else _known(controlled._asdict()),
            "mean_length": {"answers": self.lengths[0], "against": self.lengths[1]},
            **_known({"order_disagreement": self.order_disagreement}),
            "no_preference": dict(self.no_preference),
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
            "cost": self.cost,
        }


def results_of(
    pairs: Sequence[Pair],
    *,
    gamed: GamedBaselines | None,
    seed: int,
    cost: Callable[[int, int], float | None] = lambda prompt_tokens, completion_tokens: None,
) -> Results:
    """Return the figures of judged pairs.

    Args:
        pairs: with their verdicts, in the order of the answers that are compared with.
        gamed: AlpacaEval's difficulties, of as many prompts; ``None``: the length-controlled win rate without them.
        seed: decides the intervals.
        cost: of tokens that a judge has read and written.

    Raises:
        UserError: if the difficulties are of another number of prompts.
    """
    preferences = [pair.preference for pair in pairs]
    lengths, others = [len(pair.answer.text) for pair in pairs], [len(pair.other.text) for pair in pairs]
    read = sum(verdict.prompt_tokens for pair in pairs for verdict in pair.verdicts)
    written = sum(verdict.completion_tokens for pair in pairs for verdict in pair.verdicts)
    both = [pair for pair in pairs if len(pair.verdicts) > 1 and not math.isnan(pair.preference)]
    return Results(
        prompts=len(pairs),
        win_rate=win_rate(preferences, seed=seed),
        length_controlled=length_controlled_win_rate(preferences, lengths, others, gamed=gamed, seed=seed)
        if gamed is not None or has_scikit_learn()
        else None,
        lengths=(sum(lengths) / len(pairs), sum(others) / len(pairs)),
        order_disagreement=sum(pair.orders_disagree for pair in both) / len(both) if both else math.nan,
        no_preference=Counter(pair.reason for pair in pairs if math.isnan(pair.preference)),
        prompt_tokens=read,
        completion_tokens=written,
        cost=cost(read, written),
    )


def alpaca_eval_annotations(
    pairs: Sequence[Pair], *, judged: str, others: str, annotator: str
) -> list[dict[str, Any]]:
    """Return AlpacaEval's annotations: ``preference`` is 1 where the other answer wins, 2 where the judged one does.

    A prompt without a preference has null, which AlpacaEval leaves out.

    Args:
        pairs: with their verdicts.
        judged: name of who gave the judged answers.
        others: name of who gave the others.
        annotator: name of who judged.
    """
    return [
        {
            "instruction": pair.prompt.text,
            **{
                name: pair.other.prompt.metadata[name]
                for name in ("dataset",)
                if name in pair.other.prompt.metadata
            },
            "output_1": pair.other.text,
            "generator_1": others,
            "output_2": pair.answer.text,
            "generator_2": judged,
            "annotator": annotator,
            "preference": None if math.isnan(pair.preference) else 1 + pair.preference,
        }
        for pair in pairs
    ]


def _percent(rate: float, low: float, high: float) -> str:
    return f"{rate:.1%} ({low:.1%} to {high:.1%})"


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in figures.items()
    }
