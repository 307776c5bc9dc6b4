"""Is what a run has stored complete: what can be made anew is quarantined, what cannot is an error.

Rollouts can be made anew as long as the policy that gave them is there: until their iteration is trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import TOKEN_COLUMNS
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.tables import check_token_ids
from sppo_lightning.system.durable import quarantine
from sppo_lightning.types import Ranks, UserError

LOGGER = logging.getLogger(__name__)


def check_iterations(folder: RunFolder) -> int:
    """Return how many iterations a run has begun.

    Raises:
        UserError: if one of them is gone, or is not the one that its folder's name says.
    """
    begun = 1 + max(folder.iteration_numbers(), default=-1)
    for number in range(begun):
        store = folder.iteration(number)
        manifest = store.read_manifest()
        if number < begun - 1 and not (manifest and manifest["complete"]):
            raise UserError(
                f"{store.folder} is gone or incomplete although iteration {number + 1} was made after it: restore "
                "it, or start anew in another trainer.default_root_dir"
            )
        if manifest is not None and manifest["iteration"] != number:
            raise UserError(
                f"{store.folder} holds iteration {manifest['iteration']}, not {number}: put the folders of "
                "iterations/ back to their names"
            )
    return begun


def quarantine_damaged(store: IterationStore, ranks: Ranks, *, embedding_rows: int) -> bool:
    """Quarantine what is damaged of an iteration that has not been trained on; return whether its data is complete.

    Rank zero does it. What is quarantined is made anew by the policy that made it, whose fingerprint the caller has
    compared.

    Args:
        store: the iteration.
        ranks: the processes.
        embedding_rows: of the policy; data with other token ids is damaged.

    Raises:
        UserError: if nothing says which policy gave the rollouts.
    """
    return ranks.same(ranks.rank == 0 and _quarantine_damaged(store, embedding_rows))


def _quarantine_damaged(store: IterationStore, embedding_rows: int) -> bool:
    manifest = store.read_manifest()
    if manifest is None and store.shards.count() > 0:
        raise UserError(
            f"{store.folder} holds rollouts but no manifest.json, so nothing says which policy gave them: restore "
            "it from a copy, or rename that folder and run again"
        )
    if manifest is None or not manifest["complete"]:
        return False
    parts = [
        _check_or_quarantine(store.read_difficulty, store.difficulty_path),
        _check_or_quarantine(lambda: _check_pairs(store, manifest, embedding_rows), store.pairs_path),
        _check_or_quarantine(lambda: _check_shards(store, manifest, embedding_rows), store.shards.folder),
    ]
    return all(parts)


def _check_or_quarantine(check: Callable[[], object], path: Path) -> bool:
    """Return whether a check passes; a file that does not is quarantined, a shard once it is made anew."""
    try:
        check()
    except UserError:
        if path.is_file():
            quarantine(path)
        else:
            LOGGER.warning("%s is gone, or lacks something: it is made anew", path)
        return False
    return True


def _check_shards(store: IterationStore, manifest: Mapping[str, Any], embedding_rows: int) -> None:
    store.shards.check_all(embedding_rows=embedding_rows)
    _check_count(store, manifest)


def check_trained(store: IterationStore, *, embedding_rows: int) -> None:
    """Refuse to resume from an iteration that has been trained on unless all that is still needed of it is there.

    Args:
        store: the iteration.
        embedding_rows: of the policy; pairs with other token ids cannot be trained on.

    Raises:
        UserError: naming what is gone or damaged.
    """
    manifest = store.read_manifest()
    if manifest is None or not manifest["complete"]:
        raise UserError(
            f"{store.folder} is gone or incomplete although the checkpoint was trained on it: restore it, or start "
            "anew in another trainer.default_root_dir"
        )
    store.kept_shards().rewards()  # what is known of difficulty next is computed from them
    store.read_difficulty()
    _check_pairs(store, manifest, embedding_rows)
    _check_count(store, manifest)


def _check_pairs(store: IterationStore, manifest: Mapping[str, Any], embedding_rows: int) -> None:
    pairs = store.read_pairs()
    check_token_ids(store.pairs_path, pairs.table, TOKEN_COLUMNS, embedding_rows=embedding_rows)
    found, expected = len(pairs), manifest["counts"]["pairs"]
    if found != expected:
        raise UserError(
            f"{store.folder / 'pairs.parquet'} holds {found} pairs, but manifest.json counts {expected}: restore it "
            "from a copy"
        )


def _check_count(store: IterationStore, manifest: Mapping[str, Any]) -> None:
    """Refuse responses that are fewer than were sampled: the difficulties would silently be others."""
    found, expected = store.shards.count(), manifest["responses"]["sampled"]
    if found != expected:
        raise UserError(
            f"{store.shards.folder} holds {found} of the {expected} responses that manifest.json counts: restore its "
            "files from a copy"
        )
