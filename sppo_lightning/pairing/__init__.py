"""Which of a prompt's responses become pairs of a chosen and a rejected one; chosen by ``data.pairing``.

A rule sees one prompt's usable responses (``contract``), and names pairs of them by row number (``rules``). What it
names is checked, and what is no pair is dropped under a named reason (``building``).
"""

from sppo_lightning.pairing.building import (
    PAIR_COLUMNS,
    Outcome,
    main_drop_reason,
    pair_responses,
    pair_statistics,
)
from sppo_lightning.pairing.contract import Choice, Pairing, Responses
from sppo_lightning.pairing.rules import (
    BestMinimumOf,
    BestNearest,
    BestRandom,
    BestWorst,
    LengthPenalizedBestWorst,
    MarginThreshold,
    MatchedRandomPairs,
    RandomPairs,
    TopPairs,
)

__all__ = [
    "PAIR_COLUMNS",
    "BestMinimumOf",
    "BestNearest",
    "BestRandom",
    "BestWorst",
    "Choice",
    "LengthPenalizedBestWorst",
    "MarginThreshold",
    "MatchedRandomPairs",
    "Outcome",
    "Pairing",
    "RandomPairs",
    "Responses",
    "TopPairs",
    "main_drop_reason",
    "pair_responses",
    "pair_statistics",
]
