"""Pairs from scored responses."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppo_lightning.pairing import (
    PAIR_COLUMNS,
    BestRandom,
    BestWorst,
    Choice,
    Pairing,
    Responses,
    pair_responses,
    pair_statistics,
)
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.types import EncodedPrompt, PreferencePair, Prompt, Rollout, UserError

QUICK = settings(max_examples=50, deadline=None)
NAN, INF = float("nan"), float("inf")
GENERATOR = torch.Generator()
REWARDS = st.lists(
    st.none() | st.sampled_from([0.0, 0.5, 1.0, NAN, INF, -INF]) | st.floats(-5, 5), max_size=6
)


class PairingResult(NamedTuple):
    pairs: list[PreferencePair]
    dropped: Counter[str]
    dropped_choices: Counter[str]


def rollouts(rewards: Sequence[float | None], prompt_id: str = "p", texts: str = "abcdefgh") -> list[Rollout]:
    """One response a reward; the n-th reads as the n-th letter of ``texts`` and has its code as a token."""
    return [
        Rollout(prompt_id, index, f"Q {prompt_id}", texts[index], (ord(texts[index]), 1), "stop", reward)
        for index, reward in enumerate(rewards)
    ]


def paired(
    groups: Mapping[str, Sequence[Rollout]],
    pairing: Pairing | None = None,
    *,
    samples: int = 8,
    iteration: int = 0,
    seed: int = 42,
) -> PairingResult:
    prompts = {key: EncodedPrompt(Prompt(key, f"Q {key}", ()), (7, len(key))) for key in groups}
    outcomes = [
        pair_responses(
            rows,
            prompts[key],
            pairing or BestWorst(),
            samples_per_prompt=samples,
            iteration=iteration,
            seed=seed,
        )
        for key, rows in groups.items()
    ]
    assert all((not outcome.pairs) != (outcome.drop_reason is None) for outcome in outcomes)
    return PairingResult(
        [pair for outcome in outcomes for pair in outcome.pairs],
        Counter(outcome.drop_reason for outcome in outcomes if outcome.drop_reason is not None),
        sum((outcome.dropped_choices for outcome in outcomes), Counter()),
    )


def test_best_worst_golden() -> None:
    """Rewards 0.5, 2, -1, 2, -1: the highest is first met at 1 (b), the lowest at 2 (c)."""
    result = paired({"p": rollouts([0.5, 2, -1, 2, -1])})
    expected = PreferencePair(
        prompt_id="p",
        prompt_token_ids=(7, 1),
        chosen_token_ids=(ord("b"), 1),
        rejected_token_ids=(ord("c"), 1),
        chosen="b",
        rejected="c",
        chosen_reward=2,
        rejected_reward=-1,
        chosen_sample_index=1,
        rejected_sample_index=2,
    )
    (pair,) = result.pairs
    # NaN: the reference's log-probs until the reference pass; win probabilities, which this reward does not give
    assert repr(pair) == repr(expected)
    assert not result.dropped


@pytest.mark.parametrize(
    ("rewards", "texts", "reason"),
    [
        ([], "", "non_finite_reward"),
        ([1], "a", "non_finite_reward"),
        ([1, NAN], "ab", "non_finite_reward"),
        ([INF, 1, -INF, None], "abcd", "non_finite_reward"),
        ([1, 1, 1], "abc", "tied_rewards"),
        ([1, NAN, 1], "aba", "identical_responses"),
        ([1, 1, 1], "aab", "tied_rewards"),
        ([1, 1], "aa", "identical_responses"),
        ([1, 0], "aa", "identical_responses"),
        ([1, 0.5, 0], "aba", "identical_responses"),
    ],
)
def test_dropped_by_reason(rewards: list[float | None], texts: str, reason: str) -> None:
    result = paired({"p": rollouts(rewards, texts=texts), "q": rollouts([0, 1], "q")})
    assert [pair.prompt_id for pair in result.pairs] == ["q"]
    assert result.dropped == Counter({reason: 1})


def test_responses_that_read_the_same_or_have_the_same_tokens_are_identical() -> None:
    first, second = rollouts([0, 1])
    same_text = paired({"p": [first, replace(second, response=first.response)]})
    same_tokens = paired({"p": [first, replace(second, token_ids=first.token_ids)]})
    for result in (same_text, same_tokens):
        assert not result.pairs
        assert result.dropped == Counter({"identical_responses": 1})


def test_the_lowest_sample_indices_take_part() -> None:
    """Of rewards 1, 2, 0, 9, -9 the first three count, whatever order the rows come in."""
    rows = rollouts([1, 2, 0, 9, -9])
    for arranged in (rows, rows[::-1], [rows[3], rows[0], rows[4], rows[2], rows[1]]):
        (pair,) = paired({"p": arranged}, samples=3).pairs
        assert (pair.chosen, pair.rejected) == ("b", "c")


@QUICK
@given(
    rewards=st.lists(REWARDS, max_size=5),
    pairing=st.sampled_from([BestWorst(), BestRandom()]),
    data=st.data(),
)
def test_in_is_out_plus_dropped_and_pairs_are_sound(
    rewards: list[list[float | None]], pairing: Pairing, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(2, 6))
    texts = data.draw(st.text("ab", min_size=6, max_size=6))
    groups = {f"p{number}": rollouts(values, f"p{number}", texts) for number, values in enumerate(rewards)}
    result = paired(groups, pairing, samples=samples)
    assert len(groups) == len(result.pairs) + result.dropped.total()
    assert set(result.dropped) <= {"non_finite_reward", "tied_rewards", "identical_responses"}
    assert all(result.dropped.values())
    for pair in result.pairs:
        taken = [row for row in groups[pair.prompt_id] if row.usable][:samples]
        finite = [row.reward for row in taken if row.reward is not None and math.isfinite(row.reward)]
        assert pair.chosen_reward == max(finite) > pair.rejected_reward
        assert (pair.chosen_token_ids, pair.chosen, pair.chosen_reward) in [
            (row.token_ids, row.response, row.reward) for row in taken
        ]
        assert (pair.rejected_token_ids, pair.rejected, pair.rejected_reward) in [
            (row.token_ids, row.response, row.reward) for row in taken
        ]
        assert pair.chosen != pair.rejected


@QUICK
@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True))
def test_best_worst_is_extreme_and_negated_rewards_swap_the_two(values: list[float]) -> None:
    rewards = torch.tensor(values, dtype=torch.float64)
    chosen, rejected = BestWorst().choose(rewards, GENERATOR)
    assert values[chosen] == max(values)
    assert values[rejected] == min(values)
    assert BestWorst().choose(-rewards, GENERATOR) == (rejected, chosen)


def test_best_random_takes_each_lower_response_evenly() -> None:
    """Of 600 draws each of 3 lower responses gets 200, standard deviation 11.5; the tied best gets none."""
    rewards = torch.tensor([1.0, 5, 3, 5, 4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    choices = Counter(BestRandom().choose(rewards, generator) for _ in range(600))
    assert set(choices) == {Choice(1, 0), Choice(1, 2), Choice(1, 4)}
    assert all(150 < count < 250 for count in choices.values())


def test_a_random_choice_depends_on_seed_iteration_and_prompt_only() -> None:
    groups = {f"p{number}": rollouts(range(8), f"p{number}") for number in range(12)}

    def rejected(part: Mapping[str, Sequence[Rollout]], **changes: int) -> dict[str, str]:
        return {pair.prompt_id: pair.rejected for pair in paired(part, BestRandom(), **changes).pairs}

    before = rejected(groups)
    torch.manual_seed(3)
    assert rejected(dict(reversed(groups.items()))) == before
    assert rejected({"p7": groups["p7"]}) == {"p7": before["p7"]}
    assert len(set(before.values())) > 1
    assert rejected(groups, seed=1) != before
    assert rejected(groups, iteration=1) != before


def test_pairs_come_in_the_order_of_the_rollouts() -> None:
    groups = {key: rollouts([0, 1], key) for key in ("z", "a", "m")}
    assert [pair.prompt_id for pair in paired(groups).pairs] == ["z", "a", "m"]


def test_a_rule_of_ones_own_sees_finite_rewards_by_sample_index() -> None:
    seen: list[list[float]] = []

    class LastFirst(Pairing):
        def choose(self, rewards: Tensor, generator: torch.Generator) -> Choice:
            seen.append(rewards.tolist())
            return Choice(len(rewards) - 1, 0)

    (pair,) = paired({"p": rollouts([NAN, 3, 1, None, 2])[::-1]}, LastFirst()).pairs
    assert seen == [[3, 1, 2]]
    assert (pair.chosen, pair.rejected) == ("e", "b")
    assert (pair.chosen_reward, pair.rejected_reward) == (2, 3)


# ------------------------------------------------------------ several pairs of a prompt


class Chosen(Pairing):
    """Returns what it is told, and keeps what it was given."""

    most_pairs = 4

    def __init__(self, *choices: Any) -> None:
        self.choices = [Choice(*choice) if isinstance(choice, tuple) else choice for choice in choices]

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        self.given = responses
        return self.choices


class Unread:
    """A response in its file: whoever asks for its text or its tokens is counted."""

    def __init__(self, row: Rollout) -> None:
        self.row, self.read = row, 0

    def __getattr__(self, name: str) -> Any:
        if name in ("response", "token_ids"):
            self.read += 1
        return getattr(self.row, name)


def test_a_rule_of_several_pairs_sees_the_usable_responses_in_columns() -> None:
    rows = rollouts([1, NAN, 3, 2])
    rows[2] = replace(rows[2], finish_reason="length", token_ids=(9, 9, 9))
    rows[3] = replace(rows[3], reward_parts={"win_probability": 0.25})
    stored = [Unread(row) for row in rows[::-1]]
    rule = Chosen()
    result = paired({"p": cast(list[Rollout], stored)}, rule)
    assert [one.read for one in stored] == [0, 0, 0, 0]
    assert len(rule.given) == 3
    assert rule.given.sample_indices == (0, 2, 3)
    assert rule.given.rewards.tolist() == [1, 3, 2]
    assert rule.given.rewards.dtype == torch.float64
    assert rule.given.lengths.tolist() == [2, 3, 2]
    assert rule.given.finish_reasons == ("stop", "length", "stop")
    assert rule.given.win_probabilities is not None
    assert rule.given.win_probabilities.tolist() == pytest.approx([NAN, NAN, 0.25], nan_ok=True)
    assert rule.given.rows[1].response == "c"
    assert result == PairingResult([], Counter({"no_pair": 1}), Counter())


def test_without_win_probabilities_there_are_none() -> None:
    rule = Chosen((1, 0))
    (pair,) = paired({"p": rollouts([1, 2])}, rule).pairs
    assert rule.given.win_probabilities is None
    assert math.isnan(pair.chosen_win_probability)


def test_pairs_carry_win_probabilities_and_sample_indices() -> None:
    """The second response is not usable, so that the rule's row 1 is sample 2."""
    rows = [
        replace(row, reward_parts={"win_probability": share})
        for row, share in zip(rollouts([1, NAN, 2]), (0.125, NAN, 0.75), strict=True)
    ]
    (pair,) = paired({"p": rows}).pairs
    assert (pair.chosen_win_probability, pair.rejected_win_probability) == (0.75, 0.125)
    assert (pair.chosen_sample_index, pair.rejected_sample_index) == (2, 0)


def test_several_pairs_of_a_prompt_come_in_the_order_of_the_rule() -> None:
    result = paired(
        {"p": rollouts([1, 2, 3]), "q": rollouts([0, 1, 5], "q")}, Chosen((2, 0), (2, 1), (-2, 0))
    )
    assert [(pair.prompt_id, pair.chosen, pair.rejected) for pair in result.pairs] == [
        (name, *pair) for name in "pq" for pair in (("c", "a"), ("c", "b"), ("b", "a"))
    ]
    assert not result.dropped
    assert not result.dropped_choices


@pytest.mark.parametrize(
    ("choices", "kept", "dropped", "reason"),
    [
        ([(0, 1), (0, 0)], ["ab"], {"identical_responses": 1}, None),
        ([(0, 3), (0, 1)], ["ab"], {"identical_responses": 1}, None),  # both read "a"
        ([(0, 2), (0, 1)], ["ab"], {"tied_rewards": 1}, None),
        (
            [(0, 1), (0, 1), (1, 0)],
            ["ab", "ba"],
            {"repeated_pair": 1},
            None,
        ),  # which is better is the rule's to say
        ([(0, 1), (3, 1)], ["ab"], {"repeated_pair": 1}, None),  # the same two texts
        ([(0, 0), (2, 0), (0, 2)], [], {"identical_responses": 1, "tied_rewards": 2}, "tied_rewards"),
        ([], [], {}, "no_pair"),
    ],
)
def test_choices_that_are_no_pair_are_dropped_apart(
    choices: list[tuple[int, int]], kept: list[str], dropped: dict[str, int], reason: str | None
) -> None:
    """Rewards 2, 1, 2, 3 of texts a, b, c, a."""
    result = paired({"p": rollouts([2, 1, 2, 3], texts="abca")}, Chosen(*choices))
    assert [pair.chosen + pair.rejected for pair in result.pairs] == kept
    assert result.dropped_choices == Counter(dropped)
    assert result.dropped == Counter([reason] if reason else [])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            [(0, 2)],
            "data.pairing Chosen chose response 2 of the 2 usable ones to prompt 'p': it must choose from 0 to 1",
        ),
        ([(-3, 0)], "data.pairing Chosen chose response -3 of the 2 usable ones to prompt 'p'"),
        (
            [(0, 1)] * 5,
            "data.pairing Chosen chose 5 pairs of prompt 'p', more than its most_pairs=4: set most_pairs",
        ),
        ([0, 1], "data.pairing Chosen returned [0, 1]: it must return a list of Choice(chosen, rejected)"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        paired({"p": rollouts([0, 1])}, Chosen(*choices))


def test_a_rule_that_forgets_to_return_is_refused() -> None:
    class Nothing(Pairing):
        def choose(self, rewards: Tensor, generator: torch.Generator) -> Any:
            return None

    with pytest.raises(
        UserError, match=r"^data\.pairing Nothing returned \[None\]: it must return a list of"
    ):
        paired({"p": rollouts([0, 1])}, Nothing())


def test_pair_statistics_has_a_row_a_pair() -> None:
    pairs = [
        PreferencePair(name, (1,), (2,), (3,), "c", "r", chosen, 0)
        for name, chosen in (("p", 2), ("p", 1), ("q", 3), ("p", 4))
    ]
    table = PairTable.collect(pairs)
    found = pair_statistics(
        table.prompt_ids, table.statistics(), {"p": [0, 4], "q": [0, 3]}, {"p": 0.5, "q": 0.25}
    )
    assert found.prompt_ids == ("p", "p", "q", "p")
    assert found["gap"].tolist() == [2, 1, 3, 4]
    assert found["mean_reward"].tolist() == [2, 2, 1.5, 2]
    assert found["difficulty"].tolist() == [0.5, 0.5, 0.25, 0.5]


def test_pair_statistics_golden() -> None:
    """q: rewards 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3 = 14/3; the pair is 6 against 1, gap 5."""
    pairs = [
        PreferencePair("q", (1,), (1, 2, 3), (4,), "c", "r", 6, 1, -2.5, -7.5, 0.75, 0.5),
        PreferencePair("p", (1, 2), (5,), (6, 7), "c", "r", 0.5, 0.25, -1, -2),
    ]
    table = PairTable.collect(pairs)
    found = pair_statistics(
        table.prompt_ids,
        table.statistics(),
        {"p": [0.5, 0.25], "other": [1], "q": [1, 2, 6]},
        {"p": 0.1, "q": 0.2, "other": 0.3},
    )
    assert found.prompt_ids == ("q", "p")
    expected = {
        "difficulty": [0.2, 0.1],
        "mean_reward": [3, 0.375],
        "std_reward": [math.sqrt(14 / 3), 0.125],
        "min_reward": [1, 0.25],
        "max_reward": [6, 0.5],
        "samples": [3, 2],
        "gap": [5, 0.25],
        "chosen_reward": [6, 0.5],
        "rejected_reward": [1, 0.25],
        "chosen_length": [3, 1],
        "rejected_length": [1, 2],
        "reference_chosen_logp": [-2.5, -1],
        "reference_rejected_logp": [-7.5, -2],
        "chosen_win_probability": [0.75, math.nan],
        "rejected_win_probability": [0.5, math.nan],
    }
    assert set(found.columns) == set(PAIR_COLUMNS) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        assert found[name].tolist() == pytest.approx(values, nan_ok=True), name


def test_pair_statistics_of_nothing() -> None:
    found = pair_statistics([], PairTable.collect([]).statistics(), {}, {})
    assert len(found) == 0
    assert set(found.columns) == set(PAIR_COLUMNS)


def test_an_unusable_response_takes_nobodys_place() -> None:
    """Best of three usable ones, although two of the first three failed."""
    rewards = [float("nan"), 1.0, float("nan"), 3.0, 2.0]
    (pair,) = paired({"p": rollouts(rewards, "p", "abcde")}, BestWorst(), samples=3).pairs
    assert (pair.chosen_reward, pair.rejected_reward) == (3.0, 1.0)
