"""How difficult the prompts were, how they moved, and which of them gained; a low mean reward is difficult."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.report.estimates import Estimate
from sppo_lightning.report.prompt_rows import PromptRow, mean
from sppo_lightning.report.run_data import Iteration

BINS = 20
QUARTILES = ("hardest", "hard", "easy", "easiest")


class Histogram(NamedTuple):
    """Prompts by difficulty, in equal bins."""

    edges: list[float]  # one more than there are bins, the same in all iterations
    selected: dict[int, list[int]]  # by iteration: prompts in each bin that were trained on
    others: dict[int, list[int]]


def histogram(iterations: Sequence[Iteration]) -> Histogram | None:
    """Return how the prompts' difficulties are distributed; ``None`` where none is known."""
    known = {one.number: [row for row in one.rows if math.isfinite(row.difficulty)] for one in iterations}
    values = [row.difficulty for rows in known.values() for row in rows]
    if not values:
        return None
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = [low + (high - low) * number / BINS for number in range(BINS + 1)]

    def counts(rows: Sequence[PromptRow]) -> list[int]:
        found = [0] * BINS
        for row in rows:
            found[min(BINS - 1, int((row.difficulty - low) / (high - low) * BINS))] += 1
        return found

    return Histogram(
        edges,
        {number: counts([row for row in rows if row.selected]) for number, rows in known.items()},
        {number: counts([row for row in rows if not row.selected]) for number, rows in known.items()},
    )


class Moves(NamedTuple):
    """Prompts by their difficulty quartile in one iteration, and in a later one."""

    before: int
    after: int
    counts: list[list[int]]  # [quartile before][quartile after], the hardest first


def moves(iterations: Sequence[Iteration]) -> list[Moves]:
    """Return how prompts moved between quartiles, from each iteration to the next, and from the first to the last.

    Quartiles are those of the prompts that both iterations know. Prompts that tie lie in one quartile, so that
    quartiles may differ in size.
    """
    steps = list(pairwise(iterations))
    if len(steps) > 1:
        steps.append((iterations[0], iterations[-1]))
    found = []
    for one, other in steps:
        before, after = (
            {row.prompt_id: row.difficulty for row in each.rows if math.isfinite(row.difficulty)}
            for each in (one, other)
        )
        both = [prompt_id for prompt_id in before if prompt_id in after]
        if len(both) < len(QUARTILES):
            continue
        counts = [[0] * 4 for _ in QUARTILES]
        places = (_quartiles([values[prompt_id] for prompt_id in both]) for values in (before, after))
        for start, end in zip(*places, strict=True):
            counts[start][end] += 1
        found.append(Moves(one.number, other.number, counts))
    return found


def gain_by_quartile(iterations: Sequence[Iteration]) -> tuple[int, int, list[Estimate]] | None:
    """Return the iterations compared, and the mean change of reward for each quartile, the hardest first.

    A quartile by the same responses that the gain is measured from would gain or lose by chance alone: the hardest
    prompts are those that were unlucky. So prompts are ordered by every second response of their first probe, and
    their gain is that over the other ones.
    """
    measured = [one for one in iterations if one.samples]
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    order, gains = [], []
    for prompt_id, samples in first.samples.items():
        later = last.samples.get(prompt_id)
        if later is None or not later.fair or len(samples.fair) < 2:
            continue
        order.append(mean(samples.fair[0::2]))
        gains.append(mean(later.fair) - mean(samples.fair[1::2]))
    if len(order) < len(QUARTILES):
        return None
    places = torch.tensor(_quartiles(order))
    change = torch.tensor(gains, dtype=torch.float64)
    return (
        first.number,
        last.number,
        [Estimate.of(change[places == place]) for place in range(len(QUARTILES))],
    )


def _quartiles(values: Sequence[float]) -> list[int]:
    """Return the quartile of each value, 0: the lowest."""
    tensor = torch.tensor(values, dtype=torch.float64)
    bounds: Tensor = torch.quantile(tensor, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    found: list[int] = torch.bucketize(tensor, bounds).tolist()
    return found


def outcomes(iteration: Iteration) -> Mapping[str, int]:
    """Return how many prompts have a pair, and how many do not, by reason, the most frequent first.

    From the manifest where it counts them, else from the prompts.
    """
    counts: dict[str, int] = {}
    if iteration.complete and "paired_prompts" in iteration.counts:
        counts = {name: int(count) for name, count in iteration.dropped.items()}
        counts["paired"] = int(iteration.counts["paired_prompts"])
    else:
        for row in iteration.rows:
            counts[row.outcome] = counts.get(row.outcome, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (item[0] != "paired", -item[1], item[0])))
