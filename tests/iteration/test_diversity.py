"""How much the responses to a prompt differ."""

from __future__ import annotations

import math

import pytest

from sppo_lightning.iteration.diversity import Diversity


def test_golden() -> None:
    """Two prompts.

    The first one's answers, (1, 2, 1), (1, 2) and (1, 2): of 7 tokens 2 are distinct, of the bigrams 12, 21, 12, 12 two
    of four; one repeats another. The second one's, (3,) and (4, 5): 3 of 3 tokens, 1 of 1 bigram. Means: (2/7 + 1) / 2
    and (1/2 + 1) / 2; 1 of 5 answers is a repetition. First tokens: 1 three times, 3 and 4 once each. Rewards 0, 2:
    standard deviation sqrt(2); 1, 1, 1: 0, tied.
    """
    diversity = Diversity()
    diversity.add([(1, 2, 1), (1, 2), (1, 2)], [1.0, 1.0, 1.0])
    diversity.add([(3,), (4, 5)], [0.0, 2.0])
    assert diversity.metrics() == pytest.approx(
        {
            "iteration/diversity/distinct_1": (2 / 7 + 1) / 2,
            "iteration/diversity/distinct_2": 0.75,
            "iteration/responses_identical/share": 0.2,
            "iteration/first_token/entropy": -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)),
            "iteration/reward/spread": math.sqrt(2) / 2,
            "iteration/reward/tied_share": 0.5,
        }
    )


def test_single_and_empty_responses_have_no_diversity() -> None:
    diversity = Diversity()
    diversity.add([(5,)], [1.0])
    diversity.add([], [])
    diversity.add([()], [])
    assert diversity.metrics() == {"iteration/first_token/entropy": 0.0}
    assert Diversity().metrics() == {}
