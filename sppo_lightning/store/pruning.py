"""Old iterations give up their responses: the largest part of a run's folder, and what nothing asks for again.

An iteration keeps its manifest, its difficulties, and its pairs, which exports are checked with. Its manifest says
``pruned`` before the first file vanishes, so that what was interrupted is known, and finished the next time.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sppo_lightning.store.run_folder import RunFolder

LOGGER = logging.getLogger(__name__)


def prune(folder: RunFolder, finished: int, keep: int) -> None:
    """Delete the rollouts of all finished iterations but the last ``keep``.

    What cannot be deleted is warned about and tried again the next time: a run does not end for it.

    Args:
        folder: the run.
        finished: iterations that a checkpoint on disk has finished.
        keep: how many of them keep their rollouts, at least 1: the next iteration needs the last one's.
    """
    assert keep >= 1
    for number in range(finished):
        store = folder.iteration(number)
        outdated = number < finished - keep and store.complete
        if not store.shards.folder.exists() or not (outdated or store.pruned):
            continue
        try:
            store.mark_pruned()
            files, size = _delete(store.shards.folder)
        except OSError as error:
            LOGGER.warning("Iteration %d keeps rollouts that cannot be deleted: %s", number, error)
            continue
        LOGGER.info(
            "Iteration %d: deleted %d rollout files, %.1f MB (data.keep_iterations=%d)",
            *(number, files, size / 1e6, keep),
        )


def _delete(place: Path) -> tuple[int, int]:
    """Delete a folder of files; return how many there were, and their bytes."""
    files = size = 0
    for path in sorted(place.iterdir()):
        files, size = files + 1, size + path.stat().st_size
        path.unlink()
    place.rmdir()
    return files, size
