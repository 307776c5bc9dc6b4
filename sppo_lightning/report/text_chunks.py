"""Packs prompts' texts into compressed blocks of a page, each of which is opened by itself."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

CHUNK = 2**18  # characters of JSON; what opening one prompt decompresses


def packed(content: Any) -> str:
    """Return JSON, compressed, in letters that end no HTML element."""
    plain = json.dumps(
        content, separators=(",", ":")
    ).encode()  # ASCII alone: half a surrogate pair is escaped
    return base64.b64encode(gzip.compress(plain, compresslevel=6, mtime=0)).decode()


class TextChunks:
    """Blocks of texts, up to a size of all of them.

    Args:
        budget: bytes of the blocks, compressed, in the page.
    """

    def __init__(self, budget: int) -> None:
        self.blocks: list[str] = []
        self._left = budget
        self._open: dict[str, Any] = {}
        self._size = 0

    @property
    def full(self) -> bool:
        """Whether the budget is spent, so that further texts are left out."""
        return self._left <= 0

    def add(self, key: str, content: Any) -> int | None:
        """Add what is opened under a key, and return the number of its block; ``None``: it is left out.

        A block holds a key once.
        """
        if self.full:
            return None
        if key in self._open:
            self.flush()
        self._open[key] = content
        self._size += _characters(content)
        number = len(self.blocks)
        if self._size >= CHUNK:
            self.flush()
        return number

    def flush(self) -> None:
        """End the block that is being filled."""
        if self._open:
            self.blocks.append(packed(self._open))
            self._left -= len(self.blocks[-1])
            self._open, self._size = {}, 0


def _characters(content: Any) -> int:
    """Return about how long some JSON is."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list | tuple):
        return sum(map(_characters, content)) + len(content)
    if isinstance(content, dict):
        return sum(len(key) + _characters(value) for key, value in content.items())
    return 8
