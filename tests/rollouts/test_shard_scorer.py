"""Scoring on a server, while responses are sampled."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.fakes import UNSAMPLED, Digits, Echo, collector, files, wanted_of

from sppo_lightning.generation import PromptResponses, SampleRequest
from sppo_lightning.rollouts.shard_scorer import LOOK_EVERY
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import PhaseProgress, Prompt, Rollout, UserError

WAIT = 20.0  # seconds


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "rollouts")


@dataclass
class Remote(Digits):
    """As on a server; tells when it has scored."""

    remote = True
    done: threading.Event = field(default_factory=threading.Event)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        try:
            return super().score(prompts, responses)
        finally:
            self.done.set()


@dataclass
class Waiting(Echo):
    """Samples its second shard only once the first has been scored."""

    scored: threading.Event = field(default_factory=threading.Event)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        assert self.calls != 1 or self.scored.wait(WAIT)
        yield from super().generate(requests)


def collect(
    store: ShardStore,
    count: int = 6,
    *,
    generator: Echo,
    reward: Digits,
    report: list[PhaseProgress] | None = None,
) -> list[Rollout]:
    filled = collector(generator, reward, report=(report if report is not None else []).append)
    filled.collect(store, "probe", wanted_of(count), policy=UNSAMPLED, iteration=3, phase="probing")
    return list(store.read_all())


def test_a_shard_is_scored_while_the_next_is_sampled(store: ShardStore, tmp_path: Path) -> None:
    reward, seen = Remote(), list[PhaseProgress]()
    found = collect(store, generator=Waiting(scored=reward.done), reward=reward, report=seen)
    other = ShardStore(tmp_path / "other")
    assert repr(collect(other, generator=Echo(), reward=Digits())) == repr(found)
    assert files(store) == files(other)
    # the phases are still told apart, and each ends with all of its prompts
    phases = [one.phase for one in seen]
    assert phases == sorted(phases, key=["probing", "scoring"].index)
    assert (seen[-1].done, seen[-1].total) == (6, 6)
    assert reward.events[0] == "load reward on cpu"
    assert reward.events[-1] == "unload reward"


def test_a_phase_that_waits_for_its_first_reward_is_told_once_that_it_begins(store: ShardStore) -> None:
    """And one whose first shard was scored before is told so too: bars and times begin there."""

    class Late(Remote):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            time.sleep(5 * LOOK_EVERY)
            return super().score(prompts, responses)

    seen = list[PhaseProgress]()
    collect(store, 2, generator=Echo(), reward=Late(), report=seen)
    assert [one.done for one in seen if one.phase == "scoring"] == [0, 2]
    early = Remote()
    seen.clear()
    collect(
        ShardStore(store.folder / "other"), generator=Waiting(scored=early.done), reward=early, report=seen
    )
    assert next(one.done for one in seen if one.phase == "scoring") == 0


def test_a_run_that_goes_on_scores_what_it_finds_and_no_more(store: ShardStore, tmp_path: Path) -> None:
    expected = collect(ShardStore(tmp_path / "whole"), generator=Echo(), reward=Digits())
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(
            store, generator=Echo(fail_at=2), reward=Remote(fail_at=0)
        )  # neither the third nor any reward
    reward = Remote()
    assert repr(collect(store, generator=Echo(), reward=reward)) == repr(expected)
    assert reward.scored == 12
    again = Remote()
    assert repr(collect(store, generator=Echo(), reward=again)) == repr(expected)
    assert again.events == []


def test_a_reward_that_ends_the_run_ends_it_before_all_is_sampled(store: ShardStore) -> None:
    class Refusing(Remote):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            try:
                raise UserError("the key is refused")
            finally:
                self.done.set()

    @dataclass
    class Slow(Echo):
        """Goes on for as long as nobody stops it."""

        refused: threading.Event = field(default_factory=threading.Event)

        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            assert self.calls == 0 or self.refused.wait(WAIT)
            yield from super().generate(requests)

    reward = Refusing()
    engine = Slow(refused=reward.done)
    with pytest.raises(UserError, match="the key is refused"):
        collect(store, 40, generator=engine, reward=reward)
    assert engine.calls < 20
    assert all(row.reward is None for row in store.read_all())


@pytest.mark.parametrize("late", [False, True], ids=["while sampling", "after it"])
def test_rewards_that_failed_are_taken_back(late: bool, store: ShardStore) -> None:
    """They are scored again by the next start, as those of a reward in the process are."""

    class Failing(Remote):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            if late:
                assert sampled.wait(WAIT)
            super().score(prompts, responses)
            return [math.nan for _ in responses]

    class Telling(Echo):
        def unload(self) -> None:
            sampled.set()

    sampled = threading.Event()
    with pytest.raises(UserError, match="are of no use"):
        collect(store, 40, generator=Telling(), reward=Failing())
    kept = list(store.read_all())
    assert all(row.reward is None and row.drop_reason is None for row in kept)
    found = collect(store, 40, generator=Echo(), reward=Remote())
    assert not any(row.reward is None for row in found)


def test_an_engine_that_answers_twice_is_refused(store: ShardStore) -> None:
    class Twice(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for answer in super().generate(requests):
                yield from (answer, answer)

    with pytest.raises(UserError, match="Twice answered a request twice, number 1"):
        collect(store, generator=Twice(), reward=Digits())
