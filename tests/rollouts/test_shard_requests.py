"""Requests of several shards as one sequence that is made as it is read."""

from __future__ import annotations

import pytest

from sppo_lightning.generation import SampleRequest
from sppo_lightning.rollouts.shard_requests import ShardRequests

SHARDS = {3: [30, 31], 5: [50], 6: [60, 61, 62]}


def make(item: int) -> SampleRequest:
    return SampleRequest((item,), ())


def test_requests_stand_one_shard_after_the_other() -> None:
    requests = ShardRequests(SHARDS, make)
    assert len(requests) == 6
    assert [request.token_ids for request in requests] == [(30,), (31,), (50,), (60,), (61,), (62,)]
    assert requests[-1] == make(62)
    assert requests[1:4] == [make(31), make(50), make(60)]
    with pytest.raises(IndexError):
        requests[6]


def test_a_requests_place_is_known() -> None:
    places = [ShardRequests(SHARDS, make).place(position) for position in range(6)]
    assert places == [(3, 0), (3, 1), (5, 0), (6, 0), (6, 1), (6, 2)]


def test_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    requests = ShardRequests(SHARDS, lambda item: made.append(item) or make(item))  # type: ignore[func-returns-value]
    requests[2]
    assert made == [50]
