"""Several servers at once, real HTTP servers on this machine that die and come back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from support.servers import Answer, BrokenOffError, LocalServer, Request, serving, unused_port

from sppo_lightning.system import server_pool
from sppo_lightning.system.server_pool import MOST_LOSSES, ServerPool
from sppo_lightning.system.servers import Failure, ServerClient, ServerUnreachableError, UnknownModelError
from sppo_lightning.types import UserError

SOON = 20.0  # seconds that nothing here may take


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server_pool, "LOOK_EVERY", 0.02)


@contextmanager
def pool_of(
    *urls: str, ready: Callable[[ServerClient], None] = lambda client: None, **settings: Any
) -> Iterator[ServerPool]:
    chosen = {"max_concurrency": 2, "startup_timeout": SOON, "timeout": SOON, "max_retries": 1, **settings}
    pool = ServerPool("data.generator", urls, **chosen)
    pool.open(ready)
    try:
        yield pool
    finally:
        pool.close()


def posts(local: LocalServer) -> list[int]:
    return [request.body["number"] for request in local.requests if request.path == "/v1/echo"]


def ask(number: int, client: ServerClient) -> Any:
    return client.post("echo", {"number": number})


def calls(count: int) -> list[Callable[[ServerClient], Any]]:
    return [partial(ask, number) for number in range(count)]


def echo(request: Request) -> Answer:
    return Answer(200, request.body)


def test_the_least_loaded_server_is_asked() -> None:
    """One answers nothing until the other has answered all the rest."""
    waited = threading.Event()

    def slow(request: Request) -> Answer:
        if request.path == "/v1/echo":
            assert waited.wait(SOON)
        return echo(request)

    with serving(slow) as first, serving(echo) as second, pool_of(first.url, second.url) as pool:
        found = {}
        for position, answer in pool.run(calls(20)):
            found[position] = answer
            if len(found) == 18:
                waited.set()
    assert found == {number: {"number": number} for number in range(20)}
    assert len(posts(first)) == 2
    assert sorted(posts(first) + posts(second)) == list(range(20))


def test_requests_of_a_server_that_dies_are_repeated_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ExitStack() as doomed, serving(echo) as second:
        first = doomed.enter_context(serving(lambda request: hanging(request, lambda: first)))
        with pool_of(first.url, second.url) as pool:
            found = {}
            for position, answer in pool.run(calls(12)):
                found[position] = answer
                if len(found) == 10:
                    doomed.close()
    assert found == {number: {"number": number} for number in range(12)}
    assert len(posts(first)) == 2  # they hung when it died
    assert f"{first.url}' cannot be reached" in caplog.text
    assert "left out until it is there" in caplog.text


def hanging(request: Request, server: Callable[[], LocalServer]) -> Answer:
    return server().hang(request) if request.path == "/v1/echo" else echo(request)


def test_a_server_that_comes_back_is_made_ready_and_used_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port, made_ready = unused_port(), []
    with (
        ExitStack() as again,
        serving(echo) as second,
        ExitStack() as doomed,
        pool_of(
            doomed.enter_context(serving(echo, port=port)).url,
            second.url,
            ready=lambda client: made_ready.append(client.base_url),
            max_concurrency=1,
        ) as pool,
    ):
        revived: list[LocalServer] = []
        answers = pool.run(calls_until(lambda: bool(revived and posts(revived[0]))))
        for count, (_, answer) in enumerate(answers, 1):
            assert isinstance(answer, dict)
            if count == 5:
                doomed.close()
            if not revived and "left out until it is there" in caplog.text:
                revived.append(again.enter_context(serving(echo, port=port)))
    assert [url.rpartition(":")[2] for url in made_ready].count(f"{port}/v1") == 2
    assert "is there again" in caplog.text


def calls_until(done: Callable[[], bool]) -> Iterator[Callable[[ServerClient], Any]]:
    number = 0
    while not done():
        yield partial(ask, number)
        number += 1
        assert number < 100_000


def test_a_server_that_starts_late_is_waited_for_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port = unused_port()
    with ExitStack() as stack:
        late = threading.Timer(0.3, lambda: stack.enter_context(serving(echo, port=port)))
        late.start()

        def reach(client: ServerClient) -> None:
            client.post("echo", {"number": 0})

        with pool_of(f"http://127.0.0.1:{port}/v1", ready=reach) as pool:
            late.join()
            assert dict(pool.run(calls(3))) == {number: {"number": number} for number in range(3)}
    assert "Connection refused" in caplog.text
    assert "waiting, 0 of startup_timeout=20 s" in caplog.text


def test_a_server_that_never_starts_is_an_error_with_its_name() -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"

    def reach(client: ServerClient) -> None:
        client.get("models")

    with (
        pytest.raises(ServerUnreachableError, match=rf"^data.generator.base_url='{url}' cannot be reached"),
        pool_of(url, ready=reach, startup_timeout=0.1),
    ):
        pass


def test_one_of_two_that_is_not_there_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    absent = f"http://127.0.0.1:{unused_port()}/v1"

    def reach(client: ServerClient) -> None:
        client.get("models")

    with serving(echo) as there, pool_of(absent, there.url, ready=reach) as pool:
        assert len(dict(pool.run(calls(5)))) == 5
    assert f"{absent}' cannot be reached" in caplog.text


def test_the_last_server_that_goes_away_and_stays_away_ends_the_run() -> None:
    with ExitStack() as doomed:
        local = doomed.enter_context(serving(echo))
        with (
            pool_of(local.url, max_concurrency=1, startup_timeout=0.1) as pool,
            pytest.raises(ServerUnreachableError, match="cannot be reached"),
        ):
            close_after(pool.run(calls(50)), 3, doomed)


def close_after(answers: Iterator[tuple[int, Any]], place: int, doomed: ExitStack) -> None:
    for position, _ in answers:
        if position == place:
            doomed.close()


def test_a_server_that_has_lost_its_model_gets_it_again() -> None:
    """As one that was started again between two requests."""
    known, refused = set(), []

    def respond(request: Request) -> Answer:
        if request.path == "/v1/echo" and "policy" not in known:
            refused.append(request)
            return Answer(404, {"message": "no such model"})
        if request.path == "/v1/echo" and request.body["number"] == 4 and not refused:
            known.clear()
            return respond(request)
        return Answer(200, request.body)

    with (
        serving(respond) as local,
        pool_of(local.url, ready=lambda client: known.add("policy"), max_concurrency=1) as pool,
    ):
        found = dict(pool.run(calls(9)))
    assert found == {number: {"number": number} for number in range(9)}
    assert len(refused) == 1


def test_a_model_that_no_server_ever_knows_ends_the_run_at_once() -> None:
    with (
        serving(lambda request: Answer(404, {"message": "no such model"})) as local,
        pool_of(local.url) as pool,
        pytest.raises(UnknownModelError, match="knows no such address or model"),
    ):
        list(pool.run(calls(3)))


def test_a_server_that_is_of_no_use_when_it_is_back_ends_the_run() -> None:
    times = []

    def ready(client: ServerClient) -> None:
        times.append(client)
        if len(times) > 1:
            raise UserError("it has other weights now")

    with (
        serving(lambda request: Answer(404, {"message": "no such model"})) as local,
        pool_of(local.url, ready=ready) as pool,
        pytest.raises(UserError, match="it has other weights now"),
    ):
        list(pool.run(calls(3)))


def test_a_request_under_which_servers_go_away_is_given_up() -> None:
    """It may be the cause: a request can end an engine."""
    port = unused_port()
    asked = []

    def respond(request: Request) -> Answer:
        if request.path == "/v1/echo" and request.body["number"] == 2:
            asked.append(request)
            raise BrokenOffError
        return echo(request)

    def die(number: int, client: ServerClient) -> Any:
        if number == 2:
            asked.append(number)
            raise ServerUnreachableError("it went away")
        return client.post("echo", {"number": number})

    with serving(respond, port=port) as local, pool_of(local.url) as pool:
        found = dict(pool.run([partial(die, number) for number in range(5)]))
    failure = found.pop(2)
    assert isinstance(failure, Failure)
    assert failure.message == "4 times the server went away under this request: it went away"
    assert len(asked) == MOST_LOSSES + 1
    assert found == {number: {"number": number} for number in (0, 1, 3, 4)}


@pytest.mark.parametrize(
    ("urls", "message"),
    [([], "base_url is an empty list"), (["http://a/v1", "http://a/v1"], "names a server twice")],
)
def test_addresses_that_make_no_sense(urls: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerPool("data.generator", urls, max_concurrency=1, startup_timeout=1)
