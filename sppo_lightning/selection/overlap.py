"""How much selections agree: what rules of the same size would have taken from one table. Shapes: P prompts."""

from __future__ import annotations

from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection.prompt_rules import (
    Easiest,
    Hardest,
    HighestPVar,
    HighestRewardGap,
    HighestRewardStd,
)
from sppo_lightning.selection.shares import HighestShare, LowestShare, RandomFraction, Share, mask_of

COMPARED: tuple[type[Share], ...] = (
    Easiest,
    Hardest,
    HighestRewardStd,
    HighestRewardGap,
    HighestPVar,
    RandomFraction,
)
"""The rules that keep a share and need no further setting."""


def jaccard(first: Tensor, second: Tensor) -> float:
    """Return ``|A ∩ B| / |A ∪ B|`` of two bool masks ``[P]``; 1 if both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def overlaps(table: StatisticsTable, kept: Tensor, *, iteration: int, seed: int) -> dict[str, float]:
    """Return the Jaccard index of what was kept and what each rule of :data:`COMPARED` would have kept, by its name.

    Each takes as many rows as were kept. A rule that cannot score every row is left out.

    Args:
        table: that the selection saw.
        kept: ``[P]`` bool, what it kept.
        iteration: self-play iteration.
        seed: the run's seed.
    """
    keep = int(kept.sum())
    found = {}
    for kind in COMPARED:
        rule = kind(1.0)
        if isinstance(rule, HighestShare | LowestShare) and bool(rule.score(table).isnan().any()):
            continue
        rows = rule.ranked(table, iteration=iteration, seed=seed)[:keep]
        found[kind.__name__] = jaccard(kept, mask_of(rows, len(table)))
    return found
