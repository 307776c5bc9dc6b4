"""Old iterations give up their responses: the largest part of a run's folder, and what nothing asks for again.

An iteration keeps its manifest, its difficulties, and its pairs, which exports are checked with. Its manifest says
``pruned`` before the first file vanishes, so that what was interrupted is known, and finished the next time.
"""

from __future__ import annotations

import logging
import re
import stat
from pathlib import Path

from sppo_lightning.store.run_folder import RunFolder

LOGGER = logging.getLogger(__name__)
# shards, those of them that were damaged, and what a killed write left
_OWN = re.compile(r"\w+-\d{5,}\.parquet(\.damaged(-\d+)?)?|\.\w+-\d{5,}\.parquet\.\d+\.tmp")


def prune(folder: RunFolder, finished: int, keep: int) -> None:
    """Delete the rollouts of all finished iterations but the last ``keep``.

    What cannot be deleted is warned about and tried again the next time: a run does not end for it. Files that no run
    writes stay, and so does all that lies behind a link.

    Args:
        folder: the run.
        finished: iterations that a checkpoint on disk has finished.
        keep: how many of them keep their rollouts, at least 1: the next iteration needs the last one's.
    """
    assert keep >= 1
    for number in range(finished):
        store = folder.iteration(number)
        outdated = number < finished - keep and store.complete
        place = store.shards.folder
        if not place.exists() or not (outdated or store.pruned):
            continue
        link = next((path for path in (place, store.folder, folder.iterations) if path.is_symlink()), None)
        if link is not None:
            LOGGER.warning(
                "Iteration %d keeps its rollouts: %s is a link, and nothing is deleted through one",
                number,
                link,
            )
            continue
        try:
            store.mark_pruned()
            files, size = _delete(place)
        except OSError as error:
            LOGGER.warning("Iteration %d keeps rollouts that cannot be deleted: %s", number, error)
            continue
        if files:
            LOGGER.info(
                "Iteration %d: deleted %d rollout files, %.1f MB (data.keep_iterations=%d)",
                *(number, files, size / 1e6, keep),
            )
        if files and place.exists():
            LOGGER.warning("Iteration %d: %s stays, since it holds files that no run writes", number, place)


def _delete(place: Path) -> tuple[int, int]:
    """Delete a folder of rollouts, or those of its files that a run wrote; return how many, and their bytes."""
    files = size = 0
    others = False
    for path in sorted(place.iterdir()):
        if not _OWN.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
            others = True
            continue
        files, size = files + 1, size + path.stat().st_size
        path.unlink()
    if not others:
        place.rmdir()
    return files, size
