"""Where the files of a run lie."""

from __future__ import annotations

import shutil
from pathlib import Path

from sppo_lightning.store.iterations import IterationStore


class RunFolder:
    """Where the files of a run lie."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def iteration(self, number: int) -> IterationStore:
        """Return the store of self-play iteration ``number``."""
        return IterationStore(self.root / "iterations" / f"{number:03d}")

    def evaluation(self, name: str) -> Path:
        """Return the folder of a held-out evaluation."""
        return self.root / "evaluations" / name


def remove_leftovers(root: Path) -> list[Path]:
    """Remove the temporary files that a killed run left in a run folder, and return them.

    Only for who holds the folder's lock: another run's temporary files look alike.
    """
    places = [root, root / "checkpoints", root / "predictions-parts"]
    places += [folder for name in ("iterations", "evaluations") for folder in root.glob(f"{name}/*")]
    places += [folder for name in ("iterations", "evaluations") for folder in root.glob(f"{name}/*/*/")]
    found = [path for place in places for path in place.glob(".*.tmp")]
    found += [path for path in [root / ".sampling"] if path.exists()]  # a policy that was being sampled
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found
