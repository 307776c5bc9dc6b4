"""Responses that are kept for other runs of the same policy: found, sampled, damaged, another policy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.fakes import Echo, with_settings

from sppo_lightning.generation import CachedGenerator, OpenAIServerGenerator, PromptResponses, SampleRequest
from sppo_lightning.generation.weight_sync import OffPolicy
from sppo_lightning.store.identity import identity
from sppo_lightning.types import Response


class Policy:
    """A policy with a name and a level, which :class:`Echo` repeats."""

    def __init__(self, name: str = "first", level: int = 0) -> None:
        self.name, self.level = name, level

    def fingerprint(self) -> str:
        return self.name


REQUESTS = [SampleRequest((1, 2), (11, 12)), SampleRequest((3,), ()), SampleRequest((4,), (7,))]


def echo(**fields: Any) -> Echo:
    return with_settings(Echo(**fields))


def answered(
    engine: CachedGenerator, requests: list[SampleRequest], policy: Any = None
) -> list[PromptResponses]:
    engine.load(policy or Policy())
    found = sorted(engine.generate(requests))
    engine.unload()
    return found


def test_another_run_finds_what_was_sampled(tmp_path: Path) -> None:
    inner = [echo(), echo()]
    first, second = (answered(CachedGenerator(engine, str(tmp_path)), REQUESTS) for engine in inner)
    assert first == second
    plain = echo()
    plain.load(Policy())  # type: ignore[arg-type]
    assert first == sorted(plain.generate(REQUESTS))
    assert [len(engine.asked) for engine in inner] == [3, 0]
    assert inner[1].events == []  # its weights were not needed


def test_only_what_is_missing_is_sampled(tmp_path: Path) -> None:
    answered(CachedGenerator(echo(), str(tmp_path)), REQUESTS[:1])
    inner = echo()
    more = [SampleRequest((1, 2), (11, 13, 12)), SampleRequest((1, 2), ())]
    found = answered(CachedGenerator(inner, str(tmp_path)), more)
    assert inner.asked == [SampleRequest((1, 2), (13,)), SampleRequest((1, 2), ())]
    assert [response.text for response in found[0].responses] == [
        f"level 0 seed {seed}" for seed in (11, 13, 12)
    ]


def test_another_policys_responses_are_not_taken_and_not_kept(tmp_path: Path) -> None:
    engine = CachedGenerator(echo(), str(tmp_path))
    answered(engine, REQUESTS)
    later = answered(engine, REQUESTS, Policy("second", level=3))
    assert later[0].responses[0].text == "level 3 seed 11"
    assert [path.name for path in tmp_path.glob("*/*")] == ["first"]


def test_other_settings_are_another_place(tmp_path: Path) -> None:
    answered(CachedGenerator(echo(), str(tmp_path)), REQUESTS)
    inner = echo(fail_at=5)
    answered(CachedGenerator(inner, str(tmp_path)), REQUESTS)
    assert len(inner.asked) == 3


def test_a_damaged_file_is_sampled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = answered(CachedGenerator(echo(), str(tmp_path)), REQUESTS)
    (path,) = tmp_path.glob("*/*/*.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    inner = echo()
    assert answered(CachedGenerator(inner, str(tmp_path)), REQUESTS) == expected
    assert len(inner.asked) == 3
    assert "is damaged: it is kept as" in caplog.text


def test_failures_are_not_kept(tmp_path: Path) -> None:
    class Failing(Echo):
        def response(self, prompt: tuple[int, ...], seed: int) -> Response:
            return Response((), "", "failed", "server_error")

    failing = Failing()
    failing.__dict__.update({**vars(echo()), "asked": [], "events": []})
    answered(CachedGenerator(failing, str(tmp_path)), REQUESTS[:1])
    assert list(tmp_path.glob("*/*/*.parquet")) == []


def test_what_a_stopped_run_has_sampled_is_kept(tmp_path: Path) -> None:
    stopped = CachedGenerator(echo(), str(tmp_path))
    stopped.load(Policy())  # type: ignore[arg-type]
    answers = stopped.generate(REQUESTS)
    first = next(answers).request
    answers.close()  # type: ignore[attr-defined]
    inner = echo()
    answered(CachedGenerator(inner, str(tmp_path)), REQUESTS)
    assert inner.asked == [request for number, request in enumerate(REQUESTS) if number != first]


def test_it_says_what_its_engine_is(tmp_path: Path) -> None:
    engine = CachedGenerator(echo(), str(tmp_path))
    assert (engine.max_new_tokens, engine.reproducible, engine.longest_response(3)) == (8, True, 8)
    assert identity(engine)["init_args"].keys() == {"generator"}
    assert not engine.streams
    server = OpenAIServerGenerator(
        "http://localhost:1/v1", OffPolicy(), model="a", max_new_tokens=8, temperature=1.0
    )
    assert CachedGenerator(server, str(tmp_path)).streams
