"""Talking to servers, against a real HTTP server on this machine."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.servers import Answer, BrokenOffError, LocalServer, Request, serving, speaking, unused_port

from sppo_lightning.system.bounded_http import MAX_ANSWER_BYTES
from sppo_lightning.system.servers import LONGEST_MESSAGE, NO_KEY, Failure, ServerClient
from sppo_lightning.types import UserError

SOON = 20.0  # seconds that nothing here may take, far below the time-outs of the requests
NOW = {"retry-after-ms": "1"}  # asks the client to try again at once


@contextmanager
def hanging() -> Iterator[LocalServer]:
    """Serve nothing at all."""
    box: list[LocalServer] = []
    with serving(lambda request: box[0].hang(request)) as local:
        box.append(local)
        yield local


def in_turn(*answers: Answer) -> Callable[[Request], Answer]:
    """Give each answer once, the last one for ever."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


@contextmanager
def client_of(url: str, **settings: Any) -> Iterator[ServerClient]:
    chosen = {"max_retries": 1, "api_key_env": "OPENAI_API_KEY", **settings}
    client = ServerClient("data.generator", url, **chosen)
    client.open()
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(autouse=True)
def _no_key_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# -------------------------------------------------------------------- answers


def test_a_post_sends_the_body_and_returns_the_json() -> None:
    with serving(in_turn(Answer(200, {"text": "hi"}))) as local, client_of(local.url) as client:
        assert client.post("completions", {"prompt": [1, 2]}) == {"text": "hi"}
        assert client.get("models") == {"text": "hi"}
        whole = client.post(local.url.removesuffix("/v1") + "/update", {})
    assert whole == {"text": "hi"}
    assert [request.path for request in local.requests] == ["/v1/completions", "/v1/models", "/update"]
    assert local.requests[0].body == {"prompt": [1, 2]}


def test_an_answer_that_is_no_json_comes_back_as_text() -> None:
    with serving(in_turn(Answer(200, "Success: loaded"))) as local, client_of(local.url) as client:
        assert client.post("load", {}) == "Success: loaded"


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(status: int) -> None:
    answers = in_turn(Answer(status, {"error": {"message": "busy"}}, NOW), Answer(200, {"text": "hi"}))
    with serving(answers) as local, client_of(local.url) as client:
        assert client.post("completions", {}) == {"text": "hi"}
    assert len(local.requests) == 2


def test_a_server_that_goes_on_failing_costs_the_request_only() -> None:
    answers = in_turn(Answer(500, {"error": {"message": "out of memory"}}, NOW))
    with serving(answers) as local, client_of(local.url, max_retries=3) as client:
        failure = client.post("completions", {})
    assert failure.reason == "server_error"
    assert failure.message == f"data.generator.base_url='{local.url}' answered: 500 out of memory"
    assert len(local.requests) == 4


@pytest.mark.parametrize("body", [{"detail": "no field top_k"}, {"message": "no field\ntop_k"}])
def test_a_refused_request_is_not_repeated(body: Any) -> None:
    with serving(in_turn(Answer(422, body))) as local, client_of(local.url) as client:
        failure = client.post("completions", {})
    assert failure == Failure(
        "server_error", f"data.generator.base_url='{local.url}' answered: 422 no field top_k"
    )
    assert len(local.requests) == 1


def test_a_long_complaint_is_cut() -> None:
    with serving(in_turn(Answer(400, {"message": "x" * 5000}))) as local, client_of(local.url) as client:
        assert len(client.post("completions", {}).message) < 400


def test_a_server_that_says_nothing_is_timed_out() -> None:
    with hanging() as local, client_of(local.url, timeout=0.1) as client:
        failure = client.post("completions", {})
    assert failure.reason == "server_time_out"
    assert failure.message.endswith("gave no answer within 0.1 s, 2 times")
    assert len(local.requests) == 2


def test_a_connection_that_breaks_off_costs_the_request_only() -> None:
    def respond(request: Request) -> Answer:
        raise BrokenOffError

    with serving(respond) as local, client_of(local.url) as client:
        failure = client.post("completions", {})
    assert failure.reason == "server_error"
    assert "broke the connection off" in failure.message
    assert len(local.requests) == 2


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, '{"choices": [', {"content-type": "application/json"}),
        Answer(200, {"choices": []}, {"content-length": "9999", "connection": "close"}),
    ],
)
def test_half_an_answer_costs_the_request_only(answer: Answer) -> None:
    with serving(in_turn(answer)) as local, client_of(local.url, timeout=0.5, max_retries=0) as client:
        failure = client.post("completions", {})
    assert isinstance(failure, Failure)


# --------------------------------------------------------------------- bounds

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def dripping(*first: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    """Say something at once, then one drop after the other, each soon enough for a time-out of single reads."""

    def speak(connection: socket.socket) -> None:
        for part in first:
            connection.sendall(part)
        for _ in range(200):  # 10 s: a client without a deadline must end too
            time.sleep(0.05)
            connection.sendall(drop)

    return speak


EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"  # of a deflated body: it unfolds to nothing


@pytest.mark.parametrize(
    "speak",
    [
        dripping(HEAD, b"content-length: 100000\r\n\r\n", drop=b" "),
        dripping(HEAD, b"transfer-encoding: chunked\r\n\r\n", drop=b"1\r\n \r\n"),
        dripping(HEAD, b"\r\n", drop=b" "),
        dripping(HEAD, b"content-encoding: deflate\r\n\r\n\x78\x9c", drop=EMPTY_BLOCK),
        dripping(b"HTTP/1.1 200 OK\r\nx-slow: ", drop=b"y"),
        dripping(drop=b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "chunks", "body without an end", "packed", "headers", "continue"],
)
def test_a_server_that_drips_is_timed_out_as_a_whole(speak: Callable[[socket.socket], None]) -> None:
    with speaking(speak) as url, client_of(url, timeout=0.4, max_retries=0) as client:
        started = time.monotonic()
        failure = client.post("completions", {})
        took = time.monotonic() - started
    assert failure.reason == "server_time_out"
    assert failure.message.endswith("gave no answer within 0.4 s, 1 times")
    assert took < 3


def test_a_proxy_is_used_and_has_the_same_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    with serving(in_turn(Answer(200, {"text": "hi"}))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        with client_of("http://behind.invalid/v1") as client:
            assert client.post("completions", {}) == {"text": "hi"}
        assert proxy.requests[0].path == "http://behind.invalid/v1/completions"
        assert proxy.requests[0].headers["host"] == "behind.invalid"
    with speaking(dripping(HEAD, b"\r\n", drop=b" ")) as url:
        monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
        with client_of("http://behind.invalid/v1", timeout=0.4, max_retries=0) as client:
            assert client.post("completions", {}).reason == "server_time_out"


def test_a_server_that_does_not_take_the_request_is_timed_out() -> None:
    with (
        speaking(lambda connection: time.sleep(5)) as url,
        client_of(url, timeout=0.4, max_retries=0) as client,
    ):
        started = time.monotonic()
        failure = client.post("completions", {"prompt": "x" * 30_000_000})
        assert time.monotonic() - started < 3
    assert failure.reason == "server_time_out"


def test_the_deadline_is_that_of_one_try_not_of_all_requests() -> None:
    """Connections are used again: what is left of the first request's time must not count."""
    with serving(in_turn(Answer(200, {}))) as local, client_of(local.url, timeout=1.0) as client:
        for _ in range(3):
            assert client.post("completions", {}) == {}
            time.sleep(0.6)
        time.sleep(1.0)
        assert client.post("completions", {}) == {}


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_of_any_size_is_not_taken_in(packed: bool, status: int) -> None:
    body = b'"' + b"x" * (MAX_ANSWER_BYTES + 1) + b'"'
    headers = {"content-type": "application/json", **({"content-encoding": "gzip"} if packed else {})}
    answer = Answer(status, gzip.compress(body, 1) if packed else body, headers)
    with serving(in_turn(answer)) as local, client_of(local.url) as client:
        failure = client.post("completions", {})
        assert len(local.requests) == 1
    assert failure.reason == ("malformed_answer" if status == 200 else "server_error")
    assert status == 400 or failure.message.endswith("gave an answer that is larger than 64 MiB")


def test_an_answer_may_be_packed() -> None:
    packed = (gzip.compress(b'{"a": 1}'), zlib.compress(b'{"a": 1}'))
    for encoding, body in zip(("gzip", "deflate"), packed, strict=True):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        with serving(in_turn(Answer(200, body, headers))) as local, client_of(local.url) as client:
            assert client.post("completions", {}) == {"a": 1}
            assert local.requests[0].headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_an_answer_packed_without_bounds_is_refused(encoding: str) -> None:
    body = gzip.compress(gzip.compress(b"{}"))
    headers = {"content-type": "application/json", "content-encoding": encoding}
    with serving(in_turn(Answer(200, body, headers))) as local, client_of(local.url) as client:
        failure = client.post("completions", {})
    assert failure.reason == "malformed_answer"
    assert failure.message.endswith(f"gave an answer that is packed as {encoding}, which was not asked for")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(in_turn(Answer(200, {"text": "hi"}))) as other:
        place = f"{other.url}/completions?token=sk-secret"
        with (
            serving(in_turn(Answer(status, {}, {"location": place}))) as local,
            client_of(local.url) as client,
        ):
            failure = client.post("completions", {})
        assert other.requests == []
    assert failure == Failure(
        "server_error",
        f"data.generator.base_url='{local.url}' answered: {status}, go to {other.url}/completions?token=… "
        "(not followed: correct base_url)",
    )


CHARSETS = ("undefined", "rot13", "zlib", "bz2", "base64", "idna", "utf-16", "no-such-thing")


@pytest.mark.parametrize("status", [200, 400, 500])
def test_text_is_utf8_whatever_charset_an_answer_names(status: int) -> None:
    """Any codec of Python's would be taken: some raise, some unfold what is packed."""
    for charset in CHARSETS:
        answer = Answer(status, "caf\u00e9", {"content-type": f"Text/Plain; charset={charset}"})
        with serving(in_turn(answer)) as local, client_of(local.url, max_retries=0) as client:
            found = client.post("completions", {})
        if status == 200:
            assert found == "caf\u00e9"
        else:
            assert isinstance(found, Failure)
            assert found.reason == "server_error"


def test_a_charset_that_is_slow_to_read_does_not_outlast_the_time_out() -> None:
    body = b"a" * 10**6 + b"-" + b"b" * 10**5  # read as punycode, this takes a quarter of an hour
    headers = {"content-type": "text/plain; charset=punycode"}
    for status in (200, 400):
        with serving(in_turn(Answer(status, body, headers))) as local, client_of(local.url) as client:
            start = time.monotonic()
            client.post("completions", {})
            assert time.monotonic() - start < SOON


def test_no_cookie_is_kept() -> None:
    """Each later request would go through all of them."""
    with (
        serving(in_turn(Answer(200, {}, {"set-cookie": "session=1; Path=/"}))) as local,
        client_of(local.url) as client,
    ):
        for _ in range(2):
            assert client.post("completions", {}) == {}
        assert client._client is not None
        assert len(client._client._client.cookies.jar) == 0
        assert all("cookie" not in request.headers for request in local.requests)


HALVES: list[tuple[bytes, str]] = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "server_error"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}", "server_error"),
    (b"HTTP/2 200\r\n\r\n{}", "server_error"),
    (b"{}", "server_error"),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "server_error"),
    (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 50_000, "server_error"),
    (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 50_000,
        "server_error",
    ),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 500_000, "server_error"),
]


@pytest.mark.parametrize(("sent", "reason"), HALVES)
def test_what_breaks_the_protocol_costs_the_request_only(sent: bytes, reason: str) -> None:
    with (
        speaking(lambda connection: connection.sendall(sent)) as url,
        client_of(url, max_retries=0) as client,
    ):
        failure = client.post("completions", {})
    assert isinstance(failure, Failure)
    assert failure.reason == reason


def endless(*first: bytes, then: bytes) -> Callable[[socket.socket], None]:
    """Send as fast as the client reads, without an end."""

    def speak(connection: socket.socket) -> None:
        connection.sendall(b"".join(first))
        while True:
            connection.sendall(then)

    return speak


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "speak",
    [
        endless(then=b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000),
        endless(CHUNKED, then=b"1;" + b"x" * 50_000 + b"\r\n{\r\n"),
        endless(CHUNKED, then=b"1\r\n{\r\n" * 1000),
    ],
)
def test_an_answer_that_never_ends_is_timed_out(speak: Callable[[socket.socket], None]) -> None:
    with speaking(speak) as url, client_of(url, timeout=1.0, max_retries=0) as client:
        start = time.monotonic()
        failure = client.post("completions", {})
        assert time.monotonic() - start < SOON
    assert failure.reason == "server_time_out"


# ------------------------------------------------------------ unreadable answers


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"[" * 100_000, "RecursionError"),
        (b"9" * 5000, "ValueError"),
        (b"\xff\xfe{", "UnicodeDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"", "JSONDecodeError"),
    ],
)
def test_an_answer_that_no_parser_reads_costs_the_request_only(body: bytes, error: str) -> None:
    with serving(in_turn(Answer(200, body, {"content-type": "application/json"}))) as local:
        with client_of(local.url) as client:
            failure = client.post("completions", {})
        assert len(local.requests) == 1
    assert failure.reason == "malformed_answer"
    assert error in failure.message


@pytest.mark.parametrize("status", [400, 404])
def test_a_complaint_of_any_shape_is_quoted(status: int) -> None:
    deep: Any = "deep"
    for _ in range(200):
        deep = [deep]
    for body in (deep, {"error": deep}, {"message": {"a": 1}}, {"error": None}, "plain", 7):
        with serving(in_turn(Answer(status, body))) as local, client_of(local.url) as client:
            if status == 404:
                with pytest.raises(UserError, match="knows no such address or model"):
                    client.post("completions", {})
            else:
                assert client.post("completions", {}).reason == "server_error"


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), RecursionError("x"), OverflowError("x"), AttributeError("x")]
)
def test_whatever_a_reader_raises_is_that_answers_failure(error: Exception) -> None:
    client = ServerClient("data.generator", "http://localhost:1/v1")

    def broken(answer: Any) -> Any:
        raise error

    failure = client.read({"choices": []}, broken)
    assert isinstance(failure, Failure)
    assert failure.reason == "malformed_answer"
    assert failure.message == (
        f"data.generator.base_url='http://localhost:1/v1' answered what cannot be read ({client.quoted(error)}): "
        "{'choices': []}"
    )
    assert client.read({"a": 1}, lambda answer: answer["a"]) == 1
    earlier = Failure("server_time_out", "late")
    assert client.read(earlier, broken) is earlier


def test_what_a_server_says_is_quoted_in_one_printable_line() -> None:
    client = ServerClient("data.generator", "http://localhost:1/v1")
    assert client.quoted("a\nb\x1b[31m \ud800 é\u202e") == "a b\\x1b[31m \\ud800 é\\u202e"
    assert len(client.quoted("x" * 5000)) == LONGEST_MESSAGE + 1
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert client.quoted(deep) == "a list"


# ------------------------------------------------------- errors that stop a run


def test_a_server_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"
    with (
        client_of(url, max_retries=0) as client,
        pytest.raises(UserError, match=r"cannot be reached \(.*\): start the server, or correct the address"),
    ):
        client.post("completions", {})


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key(status: int) -> None:
    with serving(in_turn(Answer(status, {"error": {"message": "no access"}}))) as local:
        with (
            client_of(local.url, api_key_env="MY_KEY") as client,
            pytest.raises(
                UserError, match=r"refuses the key \(.*no access\): set the environment variable MY_KEY"
            ),
        ):
            client.get("models")
        assert len(local.requests) == 1


def test_an_unknown_model() -> None:
    complaint = {"error": {"message": "The model `x` does not exist.", "code": 404}}
    with (
        serving(in_turn(Answer(404, complaint))) as local,
        client_of(local.url) as client,
        pytest.raises(
            UserError,
            match=r"knows no such address or model \(404 The model `x` does not exist.\): correct base_url or model",
        ),
    ):
        client.post("completions", {})


# ------------------------------------------------------------------------ keys


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(in_turn(Answer(200, {}))) as local:
        with client_of(local.url, api_key_env="MY_KEY") as client:
            client.get("models")
        monkeypatch.setenv("MY_KEY", "sk-secret\n")
        with client_of(local.url, api_key_env="MY_KEY") as client:
            client.get("models")
    sent = [request.headers["authorization"] for request in local.requests]
    assert sent == [f"Bearer {NO_KEY}", "Bearer sk-secret"]


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_no_error_quotes_the_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def respond(request: Request) -> Answer:
        return Answer(status, {"error": {"message": f"got {request.headers['authorization']}"}})

    with serving(respond) as local, client_of(local.url, max_retries=0) as client:
        if status in (401, 404):
            with pytest.raises(UserError) as caught:
                client.post("completions", {})
            assert caught.value.__suppress_context__  # no traceback shows what the server said in full
            said = str(caught.value)
        else:
            said = client.post("completions", {}).message
    assert "got Bearer …" in said
    assert "secret" not in said


@pytest.mark.parametrize("key", ["sk-secret", "sk-'se\"cret\\/+=", "sk-" + "s" * 400])
def test_no_quotation_holds_the_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written; a quotation is cut only after."""
    monkeypatch.setenv("MY_KEY", key)
    client = ServerClient("data.generator", "http://localhost:1/v1", api_key_env="MY_KEY")
    for said in (key, {"key": key}, json.dumps({"key": key}), quote(key, safe=""), ValueError(f"got {key}")):
        found = client.quoted(said)
        assert "…" in found
        assert key[3:8] not in found
    assert client.quoted("x" * (LONGEST_MESSAGE - 5) + key) == "x" * (LONGEST_MESSAGE - 5) + "…"


def test_no_quotation_holds_another_bearer_token() -> None:
    client = ServerClient("data.generator", "http://localhost:1/v1")
    assert client.quoted({"authorization": "Bearer abc.DEF-123"}) == "{'authorization': 'Bearer …'}"
    assert client.quoted("got bearer  abc, refused") == "got bearer …, refused"


def test_nothing_but_the_key_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai package reads more from the environment than was asked for."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-private")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "admin-private")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://private.example/v1")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS",
        "X-Private: private\nAuthorization: Bearer private\nUser-Agent: private\nHost: private.example\n"
        "Content-Length: 3\nCookie: private",
    )
    monkeypatch.setenv("MY_KEY", "sk-mine")
    with serving(in_turn(Answer(200, {}, {"set-cookie": "a=b"}))) as local:
        for name, sent in (("MY_KEY", "sk-mine"), (None, NO_KEY)):
            with client_of(local.url, api_key_env=name) as client:
                assert client.post("completions", {"a": 1}) == {}
                assert client.get("models") == {}
            post, get = local.requests[-2:]
            assert post.headers == {
                "host": local.url.removeprefix("http://").removesuffix("/v1"),
                "accept": "application/json",
                "accept-encoding": "gzip, deflate",
                "connection": "keep-alive",
                "user-agent": "sppo-lightning",
                "authorization": f"Bearer {sent}",
                "content-type": "application/json",
                "content-length": "7",
            }
            assert post.body == {"a": 1}
            assert get.headers.keys() == post.headers.keys() - {"content-type", "content-length"}


def test_a_key_with_a_strange_character_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-geheim\u2013")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a character that no key has") as caught:
        ServerClient("data.generator", "http://localhost:1/v1", api_key_env="OPENAI_API_KEY").check()
    assert "geheim" not in str(caught.value)


def test_a_missing_client_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ServerClient("data.generator", "http://localhost:1/v1").check()
    monkeypatch.setattr("sppo_lightning.system.servers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"talks to a server: pip install 'sppo-lightning\[server\]'"):
        ServerClient("data.generator", "http://localhost:1/v1").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, r"base_url='localhost:8000' must start with http:// or https://"),
        (
            {"base_url": "http://user:geheim@localhost:8000/v1"},
            "base_url must hold no user name, password or query",
        ),
        (
            {"base_url": "http://localhost/v1?key=geheim"},
            "base_url must hold no user name, password or query",
        ),
        ({"api_key_env": "sk-geheim"}, "api_key_env must be the name of an environment variable, not a key"),
        ({"max_concurrency": 0}, "max_concurrency=0 must be at least 1"),
        ({"timeout": 0}, "timeout=0 must be greater than 0 seconds"),
        ({"timeout": float("nan")}, "timeout=nan must be greater than 0 seconds"),
        ({"max_retries": -1}, "max_retries=-1 must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data.generator.{message}"):
        ServerClient("data.generator", **{"base_url": "http://localhost:1/v1", **settings})


# ----------------------------------------------------------------- concurrency


def test_concurrency_is_reached_and_never_exceeded() -> None:
    together = threading.Barrier(3)
    lock = threading.Lock()
    under_way = most = 0

    def respond(request: Request) -> Answer:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(SOON)  # passes only if three requests are here at once
        with lock:
            under_way -= 1
        return Answer(200, request.body)

    with serving(respond) as local, client_of(local.url, max_concurrency=3, max_retries=0) as client:
        calls = [partial(client.post, "echo", {"number": number}) for number in range(9)]
        found = dict(client.run(calls))
    assert found == {number: {"number": number} for number in range(9)}
    assert most == 3


def test_calls_are_read_by_the_caller_no_further_than_what_is_under_way() -> None:
    read: list[int] = []

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(100):
            assert threading.current_thread() is threading.main_thread()
            read.append(number)
            yield lambda number=number: number  # type: ignore[misc]

    answers = ServerClient("data.generator", "http://localhost:1/v1", max_concurrency=4).run(calls())
    assert next(answers)[0] in range(4)
    assert len(read) == 4
    next(answers)
    assert len(read) == 5
    answers.close()


def test_nothing_to_call() -> None:
    assert list(ServerClient("data.generator", "http://localhost:1/v1").run([])) == []


def test_whoever_stops_early_waits_for_nothing() -> None:
    box: list[LocalServer] = []

    def respond(request: Request) -> Answer:
        return Answer(200, request.body) if request.body["number"] == 0 else box[0].hang(request)

    with serving(respond) as local, client_of(local.url) as client:
        box.append(local)
        started = time.monotonic()
        calls = [partial(client.post, "echo", {"number": number}) for number in range(8)]
        for position, _ in client.run(calls):
            assert position == 0
            break
        assert time.monotonic() - started < SOON


def test_an_exception_in_a_call_surfaces_at_once() -> None:
    def broken() -> None:
        raise ZeroDivisionError("one of the calls")

    with hanging() as local, client_of(local.url) as client:
        started = time.monotonic()
        calls = [*[partial(client.post, "echo", {})] * 3, broken]
        with pytest.raises(ZeroDivisionError, match="one of the calls"):
            list(client.run(calls))
        assert time.monotonic() - started < SOON


ENDING = """
import signal, sys, time
from functools import partial
from sppo_lightning.system.servers import ServerClient
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
client = ServerClient("data.generator", sys.argv[2])
client.open()
print("asking", flush=True)
asked = [partial(client.post, "completions", {})] * 4
for _ in client.run(asked if sys.argv[1] == "interrupt" else [*asked, partial(time.sleep, 0.5)]):
    break
"""


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_process_ends_at_once_with_requests_under_way(interrupted: bool) -> None:
    with hanging() as local:
        command = [sys.executable, "-c", ENDING, "interrupt" if interrupted else "stop", local.url]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            while interrupted and len(local.requests) < 4:
                assert process.poll() is None
                time.sleep(0.02)
            if interrupted:
                process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=SOON)
        finally:
            process.kill()
    assert ("KeyboardInterrupt" in said) == interrupted
    assert (process.returncode == 0) == (not interrupted)
