"""Classes of a config may lie in files of the current folder; what libraries look for must not be found there."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType

_PACKAGES = ("site-packages", "dist-packages")
_IMPORTERS = ("importlib", "pkgutil.py")  # of the standard library: they import for their caller
_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_OWN = Path(__file__).parents[1]  # sppo_lightning


class CurrentFolder(MetaPathFinder):
    """Finds modules in a folder, after all other places, for a config and for the modules there.

    A library that tries whether an optional package is there, as pandas does with numexpr, finds nothing: a folder may
    hold a file of that name by chance, or by somebody's intent.

    Args:
        folder: where to look.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a module lies; ``None``: not here, or not for who asks."""
        if path is not None or not _is_for_config(sys._getframe(1)):
            return None
        return PathFinder.find_spec(fullname, [str(self.folder)], target)


def _is_for_config(frame: FrameType | None) -> bool:
    """Whether an import was asked for by us, by the config's parser or by a user's own module."""
    while frame is not None:
        file = frame.f_code.co_filename
        asks = not file.startswith("<frozen ") and not (
            _LIBRARY in Path(file).parents and any(name in Path(file).parts for name in _IMPORTERS)
        )
        if asks:
            break
        frame = frame.f_back
    if frame is None:
        return False
    place = Path(frame.f_code.co_filename)
    if _OWN in place.parents or "jsonargparse" in place.parts:
        return True
    return _LIBRARY not in place.parents and not any(name in place.parts for name in _PACKAGES)


def find_modules_in(folder: Path) -> None:
    """Let a config name classes in files of a folder, unless Python finds all that is there anyway."""
    known = any(isinstance(finder, CurrentFolder) and finder.folder == folder for finder in sys.meta_path)
    if str(folder) not in sys.path and not known:
        sys.meta_path.append(CurrentFolder(folder))
