"""Reads the files of a folder one by one, and notes what cannot be read."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import yaml

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError

T = TypeVar("T")
# what the readers of Parquet, JSON, YAML and CSV raise
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    pa.ArrowException,
    yaml.YAMLError,
    csv.Error,
)


class FolderReader:
    """The files of a folder, of which any may be missing, damaged or a link to elsewhere.

    Args:
        root: the folder.

    Raises:
        UserError: if it is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing: list[str] = []
        self._inside = root.resolve()
        if not root.is_dir():
            raise UserError(
                f"{str(root)!r} is no folder: give a folder that was a fit's trainer.default_root_dir"
            )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self._inside.name

    def contains(self, path: Path) -> bool:
        """Whether a path leads to a place in the folder, links followed."""
        return path.resolve().is_relative_to(self._inside)

    def note(self, path: Path, what: str) -> None:
        """Note what is missing, by the file's place in the folder.

        Args:
            path: of the file.
            what: is the matter with it, and what the report lacks.
        """
        try:
            place = path.relative_to(self.root).as_posix()
        except ValueError:
            place = path.name
        text = f"{place}: {what}"
        if text not in self.missing:
            self.missing.append(text)

    def read(self, path: Path, read: Callable[[], T], *, lacks: str, optional: bool = False) -> T | None:
        """Return what a file holds; ``None``, with a note, where it is not there or cannot be read.

        Args:
            path: of the file.
            read: reads it.
            lacks: what the report does not show without it.
            optional: a run may lack it, which is not noted.
        """
        if not path.exists():
            if not optional:
                self.note(path, f"not there. {lacks}")
            return None
        if not self.contains(path):
            self.note(path, f"a link out of the folder, which is not followed. {lacks}")
            return None
        if not path.is_file():
            self.note(path, f"no file. {lacks}")
            return None
        try:
            return read()
        except DAMAGE:
            self.note(path, f"damaged, or of another version. {lacks}")
            return None


class RunReader(FolderReader):
    """The files of a run's folder.

    Args:
        root: the run's folder.

    Raises:
        UserError: if it is no run.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.folder = RunFolder(root)
        if not any(
            path.exists() for path in (self.folder.config, self.folder.iterations, self.folder.evaluations)
        ):
            raise UserError(
                f"{str(root)!r} is no run: it has neither config.yaml nor iterations/; give a folder that was a fit's "
                "trainer.default_root_dir"
            )
