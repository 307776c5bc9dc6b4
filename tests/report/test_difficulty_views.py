"""Histograms, moves between quartiles and gains, by hand."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence

import pytest

from sppo_lightning.report.difficulty_views import gain_by_quartile, histogram, moves, outcomes
from sppo_lightning.report.prompt_rows import PromptRow, Samples
from sppo_lightning.report.run_data import Iteration


def iteration(
    number: int,
    difficulties: Sequence[float],
    samples: Mapping[str, Samples] | None = None,
    selected: Sequence[int] = (),
) -> Iteration:
    rows = [
        PromptRow(f"p{place}", "paired", place in selected, value, 0.0, 0.0, 2, 3.0, math.nan)
        for place, value in enumerate(difficulties)
    ]
    return Iteration(number, False, {}, {}, {}, {}, samples or {}, rows, {})


def probe(*rewards: float) -> Samples:
    return Samples(probe=array("d", rewards))


def test_a_histogram_counts_every_prompt_once() -> None:
    found = histogram([iteration(0, [0.0, 0.5, 1.0], selected=[1]), iteration(1, [0.0, 0.0, math.nan])])
    assert found is not None
    assert (found.edges[0], found.edges[-1]) == (0.0, 1.0)
    assert sum(found.selected[0]) == 1
    assert found.others[0][0] == found.others[0][-1] == 1
    assert (sum(found.others[1]), found.others[1][0]) == (2, 2)


def test_a_histogram_of_equal_difficulties_has_a_width() -> None:
    found = histogram([iteration(0, [0.25, 0.25])])
    assert found is not None
    assert (found.edges[0], found.edges[-1]) == (-0.25, 0.75)


def test_no_histogram_without_difficulties() -> None:
    assert histogram([iteration(0, [math.nan])]) is None


def test_moves_between_quartiles() -> None:
    """Eight prompts, two a quartile; the hardest two become the easiest."""
    before = [0, 1, 2, 3, 4, 5, 6, 7]
    after = [8, 9, 2, 3, 4, 5, 6, 7]
    (found,) = moves([iteration(0, before), iteration(1, after)])
    assert found.counts == [[0, 0, 0, 2], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]]


def test_first_and_last_iteration_are_compared_too() -> None:
    found = moves([iteration(number, range(8)) for number in range(3)])
    assert [(one.before, one.after) for one in found] == [(0, 1), (1, 2), (0, 2)]


def test_gain_by_quartile() -> None:
    """Ordered by the first response of two, measured against the second: prompt k gains 10 + k - (k + 1)."""
    first = {f"p{k}": probe(k, k + 1) for k in range(8)}
    last = {f"p{k}": probe(10 + k, 10 + k) for k in range(8)}
    found = gain_by_quartile([iteration(0, [], first), iteration(1, [], last)])
    assert found is not None
    before, after, gains = found
    assert (before, after) == (0, 1)
    assert [gain.size for gain in gains] == [2, 2, 2, 2]
    assert [gain.mean for gain in gains] == [9.0] * 4


def test_chance_alone_shows_no_gain() -> None:
    """Rewards are noise: the unlucky prompts of the first iteration are as good as others, and gain nothing."""
    draw = random.Random(0)
    first, last = (
        {f"p{k}": probe(*(draw.gauss(0, 1) for _ in range(4))) for k in range(4000)} for _ in range(2)
    )
    found = gain_by_quartile([iteration(0, [], first), iteration(1, [], last)])
    assert found is not None
    for gain in found[2]:
        assert abs(gain.mean) < 4 * gain.stderr


def test_no_gain_without_two_iterations() -> None:
    assert gain_by_quartile([iteration(0, [], {"p": probe(1.0, 2.0)})]) is None


@pytest.mark.parametrize("complete", [False, True])
def test_outcomes_come_from_the_manifest_where_it_counts(complete: bool) -> None:
    one = iteration(0, [0.1, 0.2])
    counted = Iteration(0, complete, {"too_long": 3}, {"paired_prompts": 1}, {}, {}, {}, one.rows, {})
    assert outcomes(counted) == ({"paired": 1, "too_long": 3} if complete else {"paired": 2})
