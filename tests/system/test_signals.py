"""Signals that ask a run to stop, sent for real."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sppo_lightning.system.signals import StopSignal
from sppo_lightning.types import Stopped


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    found = StopSignal()
    yield found
    found.ignore()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_at_once(stop: StopSignal, number: signal.Signals) -> None:
    stop.listen()
    assert not stop.received
    with pytest.raises(Stopped) as left:
        send(number)
    assert left.value.signal is number
    assert stop.received


def test_a_signal_that_is_held_back_is_noted_and_obeyed_on_release(stop: StopSignal) -> None:
    stop.listen()
    stop.defer()
    send(signal.SIGTERM)
    assert stop.received
    with pytest.raises(Stopped) as left:
        stop.stop_deferring()
    assert left.value.signal is signal.SIGTERM


def test_a_release_without_a_signal_lets_the_run_go_on(stop: StopSignal) -> None:
    stop.listen()
    stop.defer()
    stop.stop_deferring()
    with pytest.raises(Stopped):
        send(signal.SIGINT)


def test_a_second_signal_does_not_wait(stop: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows within seconds comes from a terminal and from the first process, and is the same wish."""
    stop.listen()
    stop.defer()
    send(signal.SIGTERM)
    send(signal.SIGINT)
    monkeypatch.setattr("sppo_lightning.system.signals.SAME_SIGNAL_S", 0.0)
    with pytest.raises(Stopped) as left:
        send(signal.SIGINT)
    assert left.value.signal is signal.SIGTERM


def test_who_took_the_signals_before_is_not_displaced_again(stop: StopSignal) -> None:
    stop.listen()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert before == stop._take
    stop.ignore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_process_may_have_got_the_signal(stop: StopSignal) -> None:
    with pytest.raises(Stopped) as left:
        stop.raise_pending()
    assert left.value.signal is signal.SIGTERM


def test_signals_are_passed_on(stop: StopSignal) -> None:
    passed: list[int] = []
    stop.listen(passed.append)
    stop.defer()
    send(signal.SIGTERM)
    assert passed == [signal.SIGTERM]


@pytest.mark.parametrize("job", [None, "17"])
def test_slurm_warns_by_its_own_signal(
    stop: StopSignal, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    stop.listen()
    assert (signal.getsignal(signal.SIGUSR1) != before) is (job is not None)
    if job is not None:
        with pytest.raises(Stopped) as left:
            send(signal.SIGUSR1)
        assert left.value.signal is signal.SIGUSR1


def test_who_took_the_signals_before_gets_them_back(stop: StopSignal) -> None:
    taken: list[int] = []
    other = signal.signal(signal.SIGTERM, lambda got, frame: taken.append(got))
    try:
        stop.listen()
        stop.listen()  # a second time: still puts back who was there before the first
        stop.defer()
        send(signal.SIGTERM)
        stop.ignore()
        send(signal.SIGTERM)
        assert taken == [signal.SIGTERM]
        assert not stop.received
        stop.listen()
        with pytest.raises(Stopped):  # neither held nor the second
            send(signal.SIGTERM)
    finally:
        stop.ignore()
        signal.signal(signal.SIGTERM, other)


def test_a_thread_leaves_the_signals_alone(stop: StopSignal) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signal_is_no_error_to_handle() -> None:
    assert not issubclass(Stopped, Exception)
