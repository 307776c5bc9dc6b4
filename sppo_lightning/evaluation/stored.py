"""Reads the answers of an evaluation, and what is stored beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sppo_lightning.store.shards import read_rollouts
from sppo_lightning.system.durable import read_checksummed
from sppo_lightning.types import Rollout, UserError

LOGGER = logging.getLogger(__name__)
LOGPS = "logps.json"


def load_evaluation(folder: Path) -> list[Rollout] | None:
    """Return stored answers, or ``None`` if there are none that can be read."""
    final = folder / "rollouts.parquet"
    if not final.exists():
        return None
    try:
        return read_rollouts(final)
    except UserError as error:
        LOGGER.warning("%s. Its numbers are left out", error)
        return None


def stored_logps(folder: Path) -> dict[str, float]:
    """Return the summed log-probs of an evaluation's answers under the policy that gave them, by prompt id, in nats.

    None where they are missing or damaged.

    Args:
        folder: of the evaluation.
    """
    return _stored(folder, "logps")


def stored_divergences(folder: Path, earlier: str) -> dict[str, float]:
    """Return how much less likely a policy makes an earlier one's answers, by prompt id, in nats per token.

    None where they are missing or damaged, or of a version that stored their mean alone.

    Args:
        folder: of the policy's evaluation.
        earlier: name of the other policy, as :func:`~sppo_lightning.evaluation.divergence.read_answers` was given it.
    """
    return _stored(folder, "divergences", earlier)


def _stored(folder: Path, *names: str) -> dict[str, float]:
    try:
        found: Any = read_checksummed((folder / LOGPS).read_bytes())
        for name in names:
            found = found[name]
        return {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
