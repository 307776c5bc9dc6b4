"""Bounds for what files of others have this process compute and hold: a template, a pattern, nested settings."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MEMORY = 2 * 2**30  # bytes, in addition to what the process has
_STATM = Path("/proc/self/statm")


LARGEST = 1_000_000  # values in a file of settings, a repeated one counted each time


def check_size(content: object) -> None:
    """Refuse nested content that is small as a file, where a part can be named again, and huge to go through.

    Args:
        content: of a YAML file.

    Raises:
        ValueError: if it has more than :data:`LARGEST` values.
    """
    rest, count = [content], 0
    while rest:
        value = rest.pop()
        count += 1
        if count > LARGEST:
            raise ValueError(f"it unfolds to more than {LARGEST:,} values")
        if isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple | set):
            rest.extend(value)


class OutOfTimeError(Exception):
    """A computation took longer than it may."""


class _AlarmError(BaseException):
    """The alarm rang; what computes handles errors of its own, Jinja any ``Exception``, and would go on."""


@contextlib.contextmanager
def bounded(seconds: float, *, memory: int = MEMORY) -> Iterator[None]:
    """Let the context last for some time at most, and take some memory at most.

    Python's own loops, patterns and powers of integers are interrupted by the alarm clock. In threads other than the
    main one nothing is bounded: alarms ring there, and a limit of memory is the process's. Time is not bounded while
    another alarm runs; memory is bounded on Linux only.

    Args:
        seconds: that the context may last.
        memory: bytes that it may take in addition to what the process has.

    Raises:
        OutOfTimeError: after ``seconds``.
        MemoryError: where more memory is asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _bounded_memory(memory), _bounded_time(seconds):
        yield


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _AlarmError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _AlarmError:
        raise OutOfTimeError(f"not done after {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded_memory(extra: int) -> Iterator[None]:
    if not _STATM.exists():
        yield
        return
    import resource  # not on every system

    pages = int(_STATM.read_text().split(maxsplit=1)[0])
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
