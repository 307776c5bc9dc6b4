"""Waiting for a server that is not there: it still loads its model, or is being started again."""

from __future__ import annotations

import logging
import threading
import time

LOGGER = logging.getLogger(__name__)
LOOK_EVERY = 1.0  # seconds between two tries to reach a server
SAY_EVERY = 15.0  # seconds between two lines about it


class Outage:
    """How long a server has not been there, and for how long it is waited for; threads may share it.

    Args:
        longest: seconds to wait, 0 for not at all.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._lock = threading.Lock()
        self._since: float | None = None
        self._said = 0.0

    def over(self) -> None:
        """Note that the server is there."""
        with self._lock:
            self._since = None

    def goes_on(self, reason: str) -> bool:
        """Note that the server is not there, say so now and then, and return whether it is still waited for.

        Args:
            reason: one line, which names the server.
        """
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since, self._said = now, now - SAY_EVERY
            gone = now - self._since
            waited_for = gone < self.longest
            if waited_for and now - self._said >= SAY_EVERY:
                self._said = now
                LOGGER.info("%s: waiting, %.0f of startup_timeout=%g s", reason, gone, self.longest)
        return waited_for
