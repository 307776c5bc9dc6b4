"""Requests of several shards as one sequence that is made as it is read."""

from __future__ import annotations

import pytest

from sppo_lightning.generation import SampleRequest
from sppo_lightning.rollouts.requests import ShardRequests

SIZES = {3: 2, 5: 1, 6: 3}


def make(number: int, row: int) -> SampleRequest:
    return SampleRequest((10 * number + row,), ())


def test_requests_stand_one_shard_after_the_other() -> None:
    requests = ShardRequests(SIZES, make)
    assert len(requests) == 6
    assert [request.token_ids for request in requests] == [(30,), (31,), (50,), (60,), (61,), (62,)]
    assert requests[-1] == make(6, 2)
    assert requests[1:4] == [make(3, 1), make(5, 0), make(6, 0)]
    with pytest.raises(IndexError):
        requests[6]


def test_a_requests_place_is_known() -> None:
    places = [ShardRequests(SIZES, make).place(position) for position in range(6)]
    assert places == [(3, 0), (3, 1), (5, 0), (6, 0), (6, 1), (6, 2)]


def test_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[tuple[int, int]] = []

    def recorded(number: int, row: int) -> SampleRequest:
        made.append((number, row))
        return make(number, row)

    ShardRequests(SIZES, recorded)[2]
    assert made == [(5, 0)]
