"""Settings of an iteration, for tests that need some."""

from __future__ import annotations

from typing import Any

from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.pairing import BestWorst
from sppo_lightning.selection import AllPairs, AllPrompts, Easiest


def iteration_rules(**changes: Any) -> IterationRules:
    """Return settings: half of the prompts, best against worst of four, two pairs a step."""
    settings: dict[str, Any] = {
        "iterations": 2,
        "samples_per_prompt": 4,
        "probe_samples": 2,
        "pairs_per_step": 2,
        "batch_size": 1,
        "schedule": AllPrompts(),
        "selection": Easiest(0.5),
        "pairing": BestWorst(),
        "pair_selection": AllPairs(),
        "seed": 0,
    }
    return IterationRules(**{**settings, **changes})
