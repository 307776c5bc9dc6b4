"""Reads the answers of an evaluation, and what is stored beside them."""

from __future__ import annotations

import logging
from pathlib import Path

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
    try:
        found = read_checksummed((folder / LOGPS).read_bytes())["logps"]
        return {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
