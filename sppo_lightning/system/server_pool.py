"""Several servers that answer alike: a request goes to the least loaded, and elsewhere if that one goes away."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty
from typing import Any, TypeVar

from sppo_lightning.system.outage import LOOK_EVERY, Outage
from sppo_lightning.system.servers import (
    Failure,
    ServerClient,
    ServerUnreachableError,
    UnknownModelError,
)
from sppo_lightning.system.workers import daemon_workers
from sppo_lightning.types import UserError

LOGGER = logging.getLogger(__name__)
MOST_LOSSES = 3  # servers that may go away under one request, before it is taken for the cause

Result = TypeVar("Result")
Ready = Callable[[ServerClient], None]


@dataclass(eq=False)
class _Server:
    client: ServerClient
    up: bool = False
    under_way: int = 0
    times_up: int = 0  # tells a request that was sent before the server was lost from one sent after
    asked: bool = False  # whether it is there again, not yet answered
    next_look: float = 0.0  # of the monotonic clock


@dataclass(eq=False)
class _Job:
    position: int
    call: Callable[[ServerClient], Any]
    losses: int = 0
    unknown: int = 0  # times that a server knew no such model


class ServerPool:
    """Servers at ``base_urls``, each of which has to be made ready before it is asked.

    The caller's thread alone makes servers ready; requests run in threads.

    Args:
        key: config key to name in errors, e.g. ``data.generator``.
        base_urls: one or more addresses, as :class:`ServerClient` takes them.
        max_concurrency: requests under way at once, at each server.
        startup_timeout: seconds to wait where no server at all accepts connections.
        settings: of every :class:`ServerClient`.
    """

    def __init__(
        self,
        key: str,
        base_urls: Iterable[str],
        *,
        max_concurrency: int,
        startup_timeout: float,
        **settings: Any,
    ) -> None:
        self.clients = [
            ServerClient(key, url, max_concurrency=max_concurrency, **settings) for url in base_urls
        ]
        addresses = [client.base_url for client in self.clients]
        if not addresses:
            raise ValueError(f"{key}.base_url is an empty list: name a server")
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"{key}.base_url={addresses} names a server twice")
        if not startup_timeout >= 0:
            raise ValueError(f"{key}.startup_timeout={startup_timeout} must be 0 seconds or more")
        self.max_concurrency = max_concurrency
        self._outage = Outage(startup_timeout)
        self._servers: list[_Server] = []
        self._ready: Ready = lambda client: None

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if no request could be made, whatever the servers."""
        for client in self.clients:
            client.check()

    def open(self, ready: Ready) -> None:
        """Make every server ready that is there; wait for one if none is.

        Args:
            ready: makes a server ready; called again for one that was away.

        Raises:
            UserError: if none is there in time, or ``ready`` says that one is of no use.
        """
        self._servers = [_Server(client) for client in self.clients]
        self._ready = ready
        for client in self.clients:
            client.open()
        while True:
            gone = [error for server in self._servers if (error := self._try(server)) is not None]
            if len(gone) < len(self._servers):
                break
            self._count_outage(gone[0])
            time.sleep(LOOK_EVERY)
        for error in gone:
            LOGGER.warning("%s: left out until it is there", error)

    def close(self) -> None:
        """Close all connections."""
        for client in self.clients:
            client.close()
        self._servers = []

    def run(
        self, calls: Iterable[Callable[[ServerClient], Result]]
    ) -> Generator[tuple[int, Result | Failure], None, None]:
        """Run calls in threads; yield (position, result) as they come.

        ``calls`` is read by the caller's thread, no further than what is under way. A call whose server goes away, or
        has lost its model, is repeated elsewhere, or at that server once it is ready again; it must not matter which
        server runs it. Whoever stops early waits for nothing.

        Raises:
            UserError: if no server comes back in time, or one that does is of no use.
        """
        fresh: Iterator[_Job] = (_Job(position, call) for position, call in enumerate(calls))
        again: deque[_Job] = deque()
        with daemon_workers() as (start, done):
            exhausted = False
            while True:
                while (server := self._least_loaded()) is not None:
                    job = again.popleft() if again else next(fresh, None)
                    if job is None:
                        exhausted = True
                        break
                    server.under_way += 1
                    start((server, server.times_up, job), partial(job.call, server.client))
                if exhausted and not again and not any(server.under_way for server in self._servers):
                    return
                self._ask_lost_servers(start)
                try:
                    label, answer = done.get(timeout=None if self._all_up() else LOOK_EVERY)
                except Empty:
                    continue
                server, times_up, job = label
                if job is None:
                    self._take_back(server, answer)
                    continue
                server.under_way -= 1
                try:
                    result = answer.result()
                except (ServerUnreachableError, UnknownModelError) as error:
                    failure = self._lost(server, times_up, job, error)
                    if failure is None:
                        again.append(job)
                    else:
                        yield job.position, failure
                else:
                    yield job.position, result

    def _least_loaded(self) -> _Server | None:
        free = [server for server in self._servers if server.up and server.under_way < self.max_concurrency]
        return min(free, key=lambda server: server.under_way, default=None)

    def _any_up(self) -> bool:
        return any(server.up for server in self._servers)

    def _all_up(self) -> bool:
        return all(server.up for server in self._servers)

    def _lost(self, server: _Server, times_up: int, job: _Job, error: UserError) -> Failure | None:
        """Leave a server out, and return what becomes of its request: ``None`` if it is repeated."""
        if isinstance(error, UnknownModelError):
            job.unknown += 1
            if job.unknown > 1:
                raise error
        else:
            job.losses += 1
        if server.up and server.times_up == times_up:
            self._leave_out(server, error)
            # one that still answers has lost what it was handed, and can have it at once
            server.next_look = 0.0 if isinstance(error, UnknownModelError) else time.monotonic() + LOOK_EVERY
        if job.losses <= MOST_LOSSES:
            return None
        return Failure("server_error", f"{job.losses} times the server went away under this request: {error}")

    def _leave_out(self, server: _Server, error: BaseException) -> None:
        server.up = False
        if len(self._servers) > 1:
            LOGGER.warning("%s: left out until it is there", error)

    def _ask_lost_servers(self, start: Callable[[Any, Callable[[], Any]], None]) -> None:
        for server in self._servers:
            if not server.up and not server.asked and time.monotonic() >= server.next_look:
                server.asked = True
                start((server, 0, None), partial(server.client.get, "models"))

    def _take_back(self, server: _Server, answer: Future[Any]) -> None:
        """Make a server ready that answers again; some have no such address as was asked for.

        Raises:
            UserError: if no other server is there, and none was for too long.
        """
        server.asked = False
        error: UserError | None
        try:
            found = answer.result()
            error = UserError(found.message) if isinstance(found, Failure) else self._try(server)
        except UnknownModelError:
            error = self._try(server)
        except ServerUnreachableError as unreachable:
            error = unreachable
        if error is None:
            LOGGER.info("%s is there again", server.client.base_url)
            return
        server.next_look = time.monotonic() + LOOK_EVERY
        if not self._any_up():
            self._count_outage(error)

    def _try(self, server: _Server) -> ServerUnreachableError | None:
        """Make a server ready, or return why it cannot be reached."""
        try:
            self._ready(server.client)
        except ServerUnreachableError as error:
            return error
        self._outage.over()
        server.up = True
        server.times_up += 1
        return None

    def _count_outage(self, error: UserError) -> None:
        if not self._outage.goes_on(str(error)):
            raise error
