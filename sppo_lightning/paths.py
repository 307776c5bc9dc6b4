"""Paths as users write them, made into paths that exist: ``~`` and environment variables are expanded, once."""

from __future__ import annotations

import os
import re

from sppo_lightning.types import UserError

REMOTE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


def expand_path(path: str, *, key: str) -> str:
    """Return a path with ``~`` and ``$NAME`` replaced; anything else stays as it is.

    Args:
        path: from the config.
        key: of the config, for errors.

    Raises:
        UserError: if an environment variable is not set, ``~name`` is no user, or the path is a URL.
    """
    if REMOTE.match(path):
        raise UserError(
            f"{key}={path!r} is a URL: only folders and files of this machine or a mounted disk work"
        )
    if os.path.lexists(path):
        return path
    found = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{[^}]*\})", found)
    if unset:
        raise UserError(f"{key}={path!r}: the environment variable {unset[0]} is not set")
    if path.startswith("~") and found.startswith("~"):
        raise UserError(f"{key}={path!r}: there is no such user")
    return found
