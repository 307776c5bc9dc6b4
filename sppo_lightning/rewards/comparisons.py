"""Which rewards of a stored config compare responses, told without loading one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sppo_lightning.rewards.pairwise import PairwiseReward
from sppo_lightning.rewards.win_probability import WinProbabilityReward

COMPARATIVE = {kind.__name__ for kind in (PairwiseReward, WinProbabilityReward)}


def compares_responses(settings: Any) -> bool:
    """Whether a reward, or one that it is made of, scores an answer by comparing it with others.

    Held-out answers are then compared with the run's own initial policy's, so that only runs with the same initial
    answers can be compared by them. Of a class that is not this package's own it is not known: then not.

    Args:
        settings: a config's ``data.reward``.
    """
    if isinstance(settings, Mapping):
        path = str(settings.get("class_path", ""))
        own = path.startswith("sppo_lightning.") and path.rpartition(".")[2] in COMPARATIVE
        return own or any(map(compares_responses, settings.values()))
    return isinstance(settings, list) and any(map(compares_responses, settings))
