"""HTTP servers on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any


class Answer(NamedTuple):
    """What to send back."""

    status: int
    body: Any  # JSON, text, or bytes that are JSON
    headers: dict[str, str] = {}  # noqa: RUF012


class BrokenOffError(Exception):
    """Raised by an answer to close the connection without a word."""


class LocalServer:
    """Answers what ``respond`` says and remembers what it was asked."""

    def __init__(self, respond: Callable[[Request], Answer], port: int = 0) -> None:
        self.requests: list[Request] = []
        self.closing = threading.Event()  # for answers that wait
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                size = int(self.headers.get("content-length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.path, headers, json.loads(self.rfile.read(size) or "null"))
                if outer.closing.is_set():  # a connection that was kept open, of a server that is gone
                    self.close_connection = True
                    return
                outer.requests.append(request)
                try:
                    answer = respond(request)
                except BrokenOffError:
                    self.close_connection = True
                    return
                text = isinstance(answer.body, str)
                content = (
                    answer.body
                    if isinstance(answer.body, bytes)
                    else (answer.body if text else json.dumps(answer.body)).encode()
                )
                self.send_response(answer.status)
                kind = {"content-type": "text/plain" if text else "application/json"}
                length = {"content-length": str(len(content))}
                for name, value in {**kind, **length, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def hang(self, request: Request) -> Answer:
        """Answer only when the test is over."""
        self.closing.wait(60)
        raise BrokenOffError


@contextmanager
def serving(respond: Callable[[Request], Answer], *, port: int = 0) -> Iterator[LocalServer]:
    """Serve in a thread while the context lasts, at a free port unless one is named."""
    local = LocalServer(respond, port)
    thread = threading.Thread(target=partial(local.server.serve_forever, poll_interval=0.02))
    thread.start()
    try:
        yield local
    finally:
        local.closing.set()
        local.server.shutdown()
        local.server.server_close()
        thread.join()


@contextmanager
def speaking(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve one connection after the other by ``speak``, which gets it once a request's first bytes are there.

    Yields the server's address.
    """
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(2**16)
                speak(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(20)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
