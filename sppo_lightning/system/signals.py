"""Signals that ask a run to stop: raised at once, or deferred until an optimizer step is on disk."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from sppo_lightning.types import Stopped

SAME_SIGNAL_S = 3.0  # what comes within so many seconds is the same request


class StopSignal:
    """Listens for SIGTERM, Ctrl-C and, in a SLURM job, SIGUSR1.

    A signal raises :class:`~sppo_lightning.types.Stopped` wherever the process is. Between optimizer steps that
    loses no more than a kill: what is finished is on disk. After :meth:`defer` it is only noted, and pending until
    :meth:`raise_pending`; a second signal, seconds later, does not wait for that.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._received_at = 0.0  # seconds, of the monotonic clock
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}
        self._forward: Callable[[int], None] = _forward_to_nobody

    def listen(self, forward: Callable[[int], None] | None = None) -> None:
        """Take the signals from now on; in the main thread only, where Python lets one do so.

        Args:
            forward: called with each signal's number, to pass it on to processes that this one has started.
        """
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._forward = forward or _forward_to_nobody
        wanted = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            wanted.append(signal.SIGUSR1)
        for number in wanted:
            self._before[number] = signal.signal(number, self._take)

    def ignore(self) -> None:
        """Restore the handlers of before, and drop the signals that came."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:  # else somebody has done so already
                signal.signal(number, handler)
        self._before = {}
        self._received, self._deferred = None, False

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def defer(self) -> None:
        """Only note signals from now on."""
        self._deferred = True

    def stop_deferring(self) -> None:
        """Raise for signals at once again, also for one that was noted."""
        self._deferred = False
        if self.received:
            self.raise_pending()

    def raise_pending(self) -> None:
        """Raise :class:`~sppo_lightning.types.Stopped`, for a signal that came here or to another process."""
        raise Stopped(self._received or signal.SIGTERM)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # a terminal signals all processes of a run, of which the first then passes it on to the others
        again = self.received and now - self._received_at > SAME_SIGNAL_S
        if not self.received:
            self._received, self._received_at = signal.Signals(number), now
        self._forward(number)
        if again or not self._deferred:
            self.raise_pending()


def _forward_to_nobody(number: int) -> None:
    """A process that has started no others."""
