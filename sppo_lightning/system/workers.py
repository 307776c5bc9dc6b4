"""Threads that run calls while their caller goes on, and keep no process alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

Jobs = SimpleQueue[tuple[Any, Callable[[], Any]] | None]
Answers = SimpleQueue[tuple[Any, Future[Any]]]


@contextmanager
def daemon_workers() -> Iterator[tuple[Callable[[Any, Callable[[], Any]], None], Answers]]:
    """Yield a function that runs a call in a thread, and the queue on which (its label, its result) then arrives.

    There are as many threads as calls have ever been under way at once, until the context ends. They are daemons,
    unlike an executor's threads, which the interpreter waits for when it ends.
    """
    todo: Jobs = SimpleQueue()
    done: Answers = SimpleQueue()
    idle: SimpleQueue[None] = SimpleQueue()
    threads = 0

    def start(label: Any, call: Callable[[], Any]) -> None:
        nonlocal threads
        todo.put((label, call))
        try:
            idle.get_nowait()
        except Empty:
            Thread(target=_work, args=(todo, done, idle), daemon=True).start()
            threads += 1

    try:
        yield start, done
    finally:
        for _ in range(threads):
            todo.put(None)


def _work(todo: Jobs, done: Answers, idle: SimpleQueue[None]) -> None:
    while (job := todo.get()) is not None:
        label, call = job
        answer: Future[Any] = Future()
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)
        idle.put(None)
        done.put((label, answer))
