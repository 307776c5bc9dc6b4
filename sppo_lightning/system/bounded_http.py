"""One HTTP client for all servers: a deadline for a whole try, a cap on an answer's size, nothing sent unasked.

The time-outs of httpx hold for a single read, so that a server that sends a byte now and then is never timed out; its
bodies have any size, compressed ones unfold in memory, and an answer names the codec that its text is read by, any of
Python's. It keeps cookies, of which there may be any number. The openai package adds headers from its environment
variables, and follows redirects.

openai up to version 2 is made of httpx and httpcore, from version 3 on of httpx2 and httpcore2. Their interfaces are
the same.
"""

from __future__ import annotations

import sys
import threading
import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any

from openai import DefaultHttpxClient, OpenAIError, Timeout

MAX_ANSWER_BYTES = (
    64 * 2**20
)  # of one answer, unpacked; the longest completions with their token ids have one or two MiB
CONNECT_SECONDS = 30.0  # a server that takes longer to accept a connection counts as not there
WRITTEN_AT_ONCE = 64 * 2**10  # bytes of a request between two looks at the clock
UNPACKED = ("gzip", "deflate")  # encodings that unfold to a thousand times their size at most

REFUSED = "sppo_lightning.refused"
"""Key of an answer's ``extensions``: why its body was not taken."""


(httpx_client,) = DefaultHttpxClient.__bases__


class NotReachedError(OpenAIError):
    """No connection could be made; openai from version 3 on raises it as it is, older ones try again first."""


class BoundedClient(DefaultHttpxClient):
    """Sends requests that end in time, to the address that they name, with the headers that are needed.

    Args:
        api_key: sent as bearer token.
        timeout: seconds that one try may take, from looking for a connection to the answer's last byte.
        connections: kept open between requests.
    """

    def __init__(self, api_key: str, *, timeout: float, connections: int) -> None:
        limits = _httpx().Limits(max_connections=None, max_keepalive_connections=connections)
        super().__init__(
            timeout=Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            limits=limits,
            follow_redirects=False,
        )
        self._own_headers = {
            "accept": "application/json",
            "accept-encoding": ", ".join(UNPACKED),
            "connection": "keep-alive",
            "user-agent": "sppo-lightning",
            "authorization": f"Bearer {api_key}",
        }
        self.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # none is kept
        self._seconds = timeout
        self._clock = _Clock()
        transports: list[Any] = [self._transport, *self._mounts.values()]
        for transport in transports:
            if transport is not None:  # an address that no proxy serves
                pool = transport._pool
                pool._network_backend = _Backend(pool._network_backend, self._clock)

    def send(self, request: Any, **options: Any) -> Any:
        """Send a request and take its whole answer.

        An answer that is too large, or packed in a way that has no bounds, comes without its body; ``extensions`` has
        the reason under :data:`REFUSED`.

        Raises:
            NotReachedError: if nobody accepts a connection.
        """
        self._clock.deadline = time.monotonic() + self._seconds
        body = request.read()
        described = {"content-type": "application/json", "content-length": str(len(body))} if body else {}
        host = {"host": request.url.netloc.decode("ascii")}
        request.headers = type(request.headers)({**host, **self._own_headers, **described})
        unreachable = (_httpx().ConnectError, _httpx().ConnectTimeout)
        try:
            answer = super().send(request, **{**options, "stream": True, "follow_redirects": False})
        except unreachable as error:
            raise NotReachedError(str(error)) from error
        try:
            content, refused = _taken(answer)
        finally:
            answer.close()
        dropped = ("content-encoding", "content-length", "transfer-encoding", "content-type", "set-cookie")
        headers = [(name, value) for name, value in answer.headers.multi_items() if name not in dropped]
        # without the charset: text is UTF-8, whatever the answer says
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        headers += [("content-type", kind)] if kind else []
        return type(answer)(
            answer.status_code,
            headers=headers,
            content=content,
            request=request,
            extensions={REFUSED: refused} if refused else {},
        )


def response_type() -> Any:
    """Return the class of answers."""
    return _httpx().Response


def _httpx() -> Any:
    """Return the version of httpx that openai is made of."""
    return sys.modules[httpx_client.__module__.partition(".")[0]]


def _taken(answer: Any) -> tuple[bytes, str]:
    """Return an answer's body, unpacked; or nothing, and why."""
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", *UNPACKED):
        return b"", f"is packed as {encoding:.20}, which was not asked for"
    parts: list[bytes] = []
    size = 0
    for part in answer.iter_bytes():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            return b"", f"is larger than {MAX_ANSWER_BYTES // 2**20} MiB"
        parts.append(part)
    return b"".join(parts), ""


class _Clock(threading.local):
    """The deadline of the request that the present thread has under way."""

    deadline = 0.0

    def left(self, timeout: float | None) -> float:
        """Return the seconds that an operation may take, 0 or less if none are left."""
        left = self.deadline - time.monotonic()
        return left if timeout is None else min(timeout, left)


class _Backend:
    """Opens connections whose every operation ends at the deadline.

    Args:
        inner: httpcore's own.
        clock: the deadlines.
    """

    def __init__(self, inner: Any, clock: _Clock) -> None:
        self._inner = inner
        self._clock = clock

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> _Stream:
        """Open a connection."""
        left = self._clock.left(timeout)
        if left <= 0:
            raise _httpcore(self._inner).ConnectTimeout
        return _Stream(self._inner.connect_tcp(host, port, timeout=left, **options), self._clock)

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        self._inner.sleep(seconds)


class _Stream:
    """A connection whose every operation ends at the deadline.

    Args:
        inner: httpcore's own.
        clock: the deadlines.
    """

    def __init__(self, inner: Any, clock: _Clock) -> None:
        self._inner = inner
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return the next bytes."""
        left = self._clock.left(timeout)
        if left <= 0:
            raise _httpcore(self._inner).ReadTimeout
        data: bytes = self._inner.read(max_bytes, timeout=left)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        for start in range(0, len(buffer), WRITTEN_AT_ONCE):
            left = self._clock.left(timeout)
            if left <= 0:
                raise _httpcore(self._inner).WriteTimeout
            self._inner.write(buffer[start : start + WRITTEN_AT_ONCE], timeout=left)

    def close(self) -> None:
        """Close the connection."""
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        """Return the connection, encrypted."""
        left = self._clock.left(timeout)
        if left <= 0:
            raise _httpcore(self._inner).ConnectTimeout
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._clock)

    def get_extra_info(self, info: str) -> Any:
        """Return what is known of the connection."""
        return self._inner.get_extra_info(info)


def _httpcore(part: object) -> Any:
    """Return the version of httpcore that a stream or a backend comes from."""
    return sys.modules[type(part).__module__.partition(".")[0]]
