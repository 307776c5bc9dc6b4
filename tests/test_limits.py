"""Bounds of time and memory for what files of others have this process compute."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from sppo_lightning.limits import OutOfTimeError, bounded


def endless_loop() -> None:
    while True:
        with contextlib.suppress(Exception):  # as Jinja does where it evaluates constants
            time.sleep(0.001)


@pytest.mark.parametrize(
    "work",
    [
        endless_loop,
        partial(re.fullmatch, r"(\w+\.?)+x", "model.layers.0.self_attn.q_proj" * 3),
        partial(pow, 9, 9**9),
    ],
)
def test_what_takes_too_long_is_interrupted(work: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(OutOfTimeError, match=r"^not done after 0\.2 s$"), bounded(0.2):
        work()
    assert time.monotonic() - start < 20


@pytest.mark.skipif(sys.platform != "linux", reason="bounded on Linux only")
def test_what_takes_too_much_memory_is_refused() -> None:
    with pytest.raises(MemoryError), bounded(60, memory=2**28):
        bytearray(2**30)
    assert len(bytearray(2**28 + 2**20)) > 2**28  # and only there


def test_everything_is_as_it_was_afterwards() -> None:
    def state() -> tuple[object, ...]:
        alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
        return (*alarm, resource.getrlimit(resource.RLIMIT_AS))

    before = state()
    with bounded(60):
        assert state() != before
        with bounded(0.001):  # another alarm runs: it is left alone
            time.sleep(0.05)
    assert state() == before
    with pytest.raises(ZeroDivisionError), bounded(60):
        1 / 0  # noqa: B018
    assert state() == before


def test_another_thread_has_no_alarm_and_bounds_nobodys_memory() -> None:
    ended: list[bool] = []
    before = resource.getrlimit(resource.RLIMIT_AS)

    def work() -> None:
        with bounded(0.01, memory=2**20):
            time.sleep(0.05)
            ended.append(resource.getrlimit(resource.RLIMIT_AS) == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
