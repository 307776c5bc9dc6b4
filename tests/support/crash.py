"""A machine that goes down."""

from __future__ import annotations


class CrashError(Exception):
    """The machine went down."""
