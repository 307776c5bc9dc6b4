"""Where the files of a run lie."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.types import UserError

_FILES = ("manifest.json", "difficulty.parquet", "pairs.parquet", "rollouts.parquet")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # as durable.replacing names them


class RunFolder:
    """Where the files of a run lie.

    Args:
        root: ``trainer.default_root_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        """The run's config, as resolved."""
        return self.root / "config.yaml"

    @property
    def loggers(self) -> Path:
        """The runs of experiment trackers that this run logs to."""
        return self.root / "loggers.json"

    @property
    def metrics(self) -> Path:
        """All metrics that were logged."""
        return self.root / "metrics.csv"

    @property
    def last_checkpoint(self) -> Path:
        """What the run is resumed from: a file, or a link to a folder of shards next to it."""
        return self.root / "checkpoints" / "last.ckpt"

    @property
    def iterations(self) -> Path:
        """The self-play iterations, a folder each."""
        return self.root / "iterations"

    def iteration(self, number: int) -> IterationStore:
        """Return the store of self-play iteration ``number``."""
        return IterationStore(self.iterations / f"{number:03d}")

    def iteration_numbers(self) -> list[int]:
        """Return the self-play iterations that have a folder, in no order."""
        return _numbers(self.iterations)

    @property
    def evaluations(self) -> Path:
        """The held-out evaluations, a folder each."""
        return self.root / "evaluations"

    def evaluation(self, name: str) -> Path:
        """Return the folder of a held-out evaluation."""
        return self.evaluations / name

    @property
    def policy(self) -> Path:
        """The policy of the latest finished iteration."""
        return self.root / "policy"

    @property
    def best(self) -> Path:
        """The policy with the best held-out reward of all finished iterations."""
        return self.root / "best"

    @property
    def gate(self) -> Path:
        """What was decided about the policy at each iteration's end."""
        return self.root / "gate.json"

    def kept_weights(self, finished: int) -> Path:
        """Return where the trained weights after ``finished`` iterations are kept, for a run to revert to."""
        return self.root / "checkpoints" / f"weights-{finished:03d}"

    def kept_policy(self, iteration: int) -> Path:
        """Return the folder of an earlier iteration's policy, where those are kept."""
        return self.root / "policies" / f"{iteration:03d}"

    def kept_policies(self) -> list[int]:
        """Return the iterations whose policies are kept, in no order."""
        return _numbers(self.root / "policies")

    def export(self, format: str) -> Path:
        """Return where a policy is exported to, unless another folder is named."""
        return self.root / f"export-{format}"

    @property
    def samples(self) -> Path:
        """Some held-out answers, for people."""
        return self.root / "samples.md"

    @property
    def report(self) -> Path:
        """What happened, as a page for a browser."""
        return self.root / "report.html"

    @property
    def environment(self) -> Path:
        """What each start of the run ran on."""
        return self.root / "environment.json"

    def predictions(self, name: str) -> Path:
        """Return the file called ``name`` of what ``predict`` answered."""
        return self.root / name

    @property
    def prediction_parts(self) -> Path:
        """Shards of predictions that are being made."""
        return self.root / "predictions-parts"

    @property
    def lock(self) -> Path:
        """The file whose lock the run holds."""
        return self.root / ".lock"

    @property
    def rendezvous(self) -> Path:
        """Where the run's processes leave each other files."""
        return self.root / ".rendezvous"

    @property
    def sampling(self) -> Path:
        """The sharded policy in full, while it is being sampled."""
        return self.root / ".sampling"


def check_kinds(folder: RunFolder) -> None:
    """Refuse folders where files are to be and the other way round, and pipes and devices, which never end.

    Raises:
        UserError: naming what is there.
    """
    numbered = [path for place in (folder.iterations, folder.evaluations) for path in place.glob("[0-9]*")]
    folders = [folder.evaluations, *(path for path in numbered if re.fullmatch("[0-9]+", path.name))]
    files = [folder.config, folder.metrics, *(path / name for path in folders for name in _FILES)]
    read = [folder.last_checkpoint, *folder.iterations.glob("*/*/*"), *folder.evaluations.glob("*/*")]
    for path, what in [*((path, "folder") for path in folders), *((path, "file") for path in files)]:
        if path.exists() and not (path.is_dir() if what == "folder" else path.is_file()):
            raise UserError(
                f"{path} is no {what}, which a run has there: move it away, or use another trainer.default_root_dir"
            )
    for path in read:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no file: move it away, or use another trainer.default_root_dir")


def remove_leftovers(folder: RunFolder) -> list[Path]:
    """Remove the temporary files that a killed run left in a run folder, and return them.

    Only for who holds the folder's lock: another run's temporary files look alike.
    """
    places = [folder.root, folder.last_checkpoint.parent, folder.prediction_parts]
    for parts in (folder.iterations, folder.evaluations):
        places += [*parts.glob("*"), *parts.glob("*/*/")]
    found = [
        path
        for place in places
        if not _through_link(place, folder.root)
        for path in place.glob(".*.tmp")
        if _TEMPORARY.fullmatch(path.name)
    ]
    found += [path for path in [folder.sampling] if os.path.lexists(path)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


def _through_link(place: Path, root: Path) -> bool:
    """Whether a folder lies behind a link below the run's root: what is there may be another's."""
    return any(part.is_symlink() for part in (place, *place.parents) if root in part.parents)


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[0-9]*") if re.fullmatch("[0-9]+", path.name)]
