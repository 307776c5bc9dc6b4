"""Selections by spread of rewards, of pairs, and made of other selections."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.statistics_tables import pair_table, probe_table, shuffled, with_responses
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection import (
    RIP,
    All,
    AllOf,
    AllPairs,
    DropHardest,
    Easiest,
    Hardest,
    HighestLearnability,
    HighestPerplexity,
    HighestPVar,
    HighestRewardGap,
    HighestRewardStd,
    LargestLogpMargin,
    LowestPerplexity,
    MatchedRandom,
    PerCategory,
    RandomFraction,
    RewardBand,
    RIPThresholds,
    Selection,
    SmallestLogpMargin,
    jaccard,
    overlaps,
)
from sppo_lightning.types import UserError

QUICK = settings(max_examples=40, deadline=None)
VALUES = [-1.0, 0.0, 0.25, 2.0]
REWARDS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4),
    max_size=12,
)
LN3 = math.log(3)


def kept(rule: Selection, table: StatisticsTable, *, iteration: int = 0, seed: int = 42) -> Counter[str]:
    mask = rule.select(table, iteration=iteration, seed=seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(table),)
    return Counter(key for key, keep in zip(table.prompt_ids, mask.tolist(), strict=True) if keep)


def names(rule: Selection, table: StatisticsTable, **at: int) -> str:
    return "".join(sorted(kept(rule, table, **at).elements()))


# ------------------------------------------------------------------- golden values

SPREAD = probe_table(
    {"a": [1, 1, 1, 1], "b": [0, 0, 0, 4], "c": [-2, -2, 1, 1], "d": [0.25, 0.75, 0.25, 0.75]}
)
"""Means 1, 1, -0.5, 0.5; standard deviations 0, √3, 1.5, 0.25; gaps 0, 4, 3, 0.5."""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (HighestRewardStd(0.5), "bc"),
        (HighestRewardStd(0.25), "b"),
        (HighestRewardGap(0.5), "bc"),
        (HighestRewardGap(0.75), "bcd"),
        (RewardBand(0.5, 0.5), "abd"),
        (RewardBand(0.5, 0.49), "d"),
        (RewardBand(-3, 1), ""),
        (AllOf([HighestRewardGap(0.5), Easiest(0.5)]), "b"),
        (AllOf([RewardBand(1, 0)]), "ab"),
        (AllOf([All(), Hardest(0.25), HighestRewardGap(0.25)]), ""),
    ],
)
def test_prompts_golden(rule: Selection, expected: str) -> None:
    assert names(rule, SPREAD) == expected


def test_std_and_gap_can_differ() -> None:
    """Standard deviations 1 and √(0.5 · 1.25²) = 0.88; gaps 2 and 2.5."""
    table = probe_table({"a": [0, 2, 0, 2], "b": [0, 1.25, 1.25, 2.5]})
    assert names(HighestRewardStd(0.5), table) == "a"
    assert names(HighestRewardGap(0.5), table) == "b"


def test_pvar_golden() -> None:
    """σ(ln 3) = ¾. Of rewards 0, ln 3 both preferences lie ¼ from ½: 1/16. Of 0, 0, ln 3 four of six do: 1/24."""
    table = probe_table({"a": [0, LN3], "b": [0, 0, LN3], "c": [5, 5], "d": [7], "e": [0, 100]})
    score = HighestPVar(1.0).score(table)
    assert score[[0, 1, 2, 4]].tolist() == pytest.approx([1 / 16, 1 / 24, 0, 1 / 4])
    assert math.isnan(score[3])
    assert [names(HighestPVar(share), table) for share in (0.2, 0.4, 0.6, 0.8)] == ["e", "ae", "abe", "abce"]


@QUICK
@given(REWARDS)
def test_pvar_is_the_variance_over_ordered_pairs(rewards: Mapping[str, Sequence[float]]) -> None:
    for found, values in zip(
        HighestPVar(1.0).score(probe_table(rewards)).tolist(), rewards.values(), strict=True
    ):
        preferences = [1 / (1 + math.exp(second - first)) for first, second in permutations(values, 2)]
        expected = statistics.pvariance(preferences) if preferences else math.nan
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_pvar_of_many_responses_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {f"p{number}": [0.0, number / 7, number / 3] for number in range(20)}
    whole = HighestPVar(1.0).score(probe_table(rewards))
    monkeypatch.setattr("sppo_lightning.selection.prompt_rules.PAIRS_AT_ONCE", 20)
    assert HighestPVar(1.0).score(probe_table(rewards)).tolist() == whole.tolist()


def test_learnability_golden() -> None:
    """Shares of rewards from 0.5 on: 1/4, 1/2, 1, 0: p(1 - p) = 3/16, 1/4, 0, 0."""
    table = probe_table({"a": [0, 0.5, 0.4, 0], "b": [0, 1], "c": [0.5], "d": [0.49]})
    assert HighestLearnability(1.0, threshold=0.5).score(table).tolist() == [3 / 16, 1 / 4, 0, 0]
    assert names(HighestLearnability(0.5, threshold=0.5), table) == "ab"


@pytest.mark.parametrize("rule", [HighestPVar(0.5), HighestLearnability(0.5, threshold=0.5)])
def test_a_prompt_that_was_not_probed_in_this_iteration_ranks_last(rule: Selection) -> None:
    known = probe_table({"a": [0, 1], "b": [0, 1], "c": [0, 0], "d": [0, 0]})
    table = with_responses(known, {"c": [1, 1], "d": [1, 1]})
    assert all(names(rule, table, seed=seed) == "cd" for seed in range(8))


PAIRS = pair_table(
    "abcd",
    rejected_reward=[0, 1, 2, 3],
    rejected_length=[10, 40, 20, 30],
    gap=[1, 2, 4, 3],
    chosen_length=[10, 10, 5, 20],
    reference_chosen_logp=[-10, -20, -2.5, -60],
    reference_rejected_logp=[-20, -40, -100, -15],
)
"""Log-probs a token of chosen -1, -2, -0.5, -3, of rejected -2, -1, -5, -0.5: margins 1, -1, 4.5, -2.5."""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RIP(0, 0, 1), "abcd"),
        (RIP(0.5, 0.5, 1), "d"),  # medians 1.5 and 25
        (RIP(0.5, 0, 1), "cd"),
        (RIP(0, 0.5, 1), "bd"),
        (RIP(0, 0, 0.5), "ab"),  # median 2.5
        (RIP(1, 0, 1), "d"),
        (RIPThresholds(1, 20, 3), "bd"),
        (RIPThresholds(-9, 0, 2), "ab"),
        (SmallestLogpMargin(0.25), "d"),
        (SmallestLogpMargin(0.5), "bd"),
        (LargestLogpMargin(0.25), "c"),
        (LargestLogpMargin(0.5), "ac"),
        (LowestPerplexity(0.5), "ac"),
        (HighestPerplexity(0.5), "bd"),
    ],
)
def test_pairs_golden(rule: Selection, expected: str) -> None:
    assert names(rule, PAIRS) == expected


def test_perplexity_golden() -> None:
    """Perplexities e, e², √e, e³."""
    assert LowestPerplexity(1.0).score(PAIRS).exp().tolist() == pytest.approx(
        [math.e, math.e**2, math.sqrt(math.e), math.e**3]
    )


def test_rip_of_no_pairs() -> None:
    empty = pair_table("", rejected_reward=[], rejected_length=[], gap=[])
    assert RIP(0.5, 0.5, 0.5).select(empty, iteration=0, seed=0).shape == (0,)


# ---------------------------------------------------------------------- properties

SHARES: list[Callable[[float], Selection]] = [
    HighestRewardStd,
    HighestRewardGap,
    HighestPVar,
    lambda share: HighestLearnability(share, threshold=0.25),
]
PROMPT_RULES = [
    *(build(share) for build in SHARES for share in (0.3, 0.5, 1.0)),
    RewardBand(0.25, 0.5),
    AllOf([Easiest(0.5), HighestPVar(0.75)]),
    PerCategory(Easiest(0.5)),
    PerCategory(HighestPVar(0.5)),
    PerCategory(RandomFraction(0.5)),
    MatchedRandom(RewardBand(0.25, 0.5)),
    MatchedRandom(PerCategory(Hardest(0.4))),
]


def categorised(rewards: Mapping[str, Sequence[float]]) -> StatisticsTable:
    return probe_table(rewards, category=[name[0] for name in rewards])


@QUICK
@given(st.sampled_from(PROMPT_RULES), REWARDS, st.integers(0, 3), st.integers(0, 99))
def test_prompt_rules_do_not_see_the_order_of_rows(
    rule: Selection, rewards: Mapping[str, Sequence[float]], iteration: int, seed: int
) -> None:
    table = categorised(rewards)
    found = kept(rule, table, iteration=iteration, seed=seed)
    assert kept(rule, shuffled(table, seed), iteration=iteration, seed=seed) == found
    assert kept(rule, table, iteration=iteration, seed=seed) == found
    size = rule.size(len(table), iteration=iteration)
    assert size is None or size == found.total()


PAIR_RULES = [
    RIP(0.25, 0.5, 0.75),
    RIPThresholds(0.0, 2, 1.0),
    SmallestLogpMargin(0.4),
    LargestLogpMargin(0.4),
    LowestPerplexity(0.4),
    HighestPerplexity(0.4),
    HighestRewardGap(0.4),
    AllOf([RIP(0.25, 0.25, 1), SmallestLogpMargin(0.75)]),
    MatchedRandom(RIP(0.25, 0.5, 0.75)),
]
NUMBERS = st.sampled_from([1.0, 2.0, 5.0])
COLUMNS = (*vars(PAIRS)["columns"], "max_reward", "min_reward")


@QUICK
@given(
    st.sampled_from(PAIR_RULES),
    st.lists(st.tuples(*[NUMBERS] * len(COLUMNS)), max_size=10),
    st.integers(0, 99),
)
def test_pair_rules_do_not_see_the_order_of_rows(
    rule: Selection, rows: list[tuple[float, ...]], seed: int
) -> None:
    """With one pair a prompt, so that a name says which pair was kept."""
    ids = [f"p{number}" for number in range(len(rows))]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    table = pair_table(ids, **columns)
    found = kept(rule, table, seed=seed)
    assert kept(rule, shuffled(table, seed), seed=seed) == found
    size = rule.size(len(table), iteration=0)
    assert size is None or size == found.total()


@QUICK
@given(st.sampled_from(SHARES), REWARDS, st.integers(0, 99))
def test_a_larger_share_contains_a_smaller_one(
    build: Callable[[float], Selection], rewards: Mapping[str, Sequence[float]], seed: int
) -> None:
    table = probe_table(rewards)
    small, large = (kept(build(share), table, seed=seed) for share in (0.3, 0.7))
    assert small <= large


@pytest.mark.parametrize("build", SHARES)
def test_ties_are_settled_evenly(build: Callable[[float], Selection]) -> None:
    """Each of 8 tied prompts is kept 2 times in 8: of 200 draws 50, standard deviation 6.1."""
    table = probe_table({f"p{number}": [0, 1] for number in range(8)})
    counts = Counter(key for seed in range(200) for key in kept(build(0.25), table, seed=seed))
    assert all(25 < counts[key] < 75 for key in table.prompt_ids)


@QUICK
@given(REWARDS, st.integers(0, 99))
def test_all_of_keeps_what_each_keeps(rewards: Mapping[str, Sequence[float]], seed: int) -> None:
    table = probe_table(rewards)
    parts: list[Selection] = [Easiest(0.6), HighestRewardGap(0.6), DropHardest(0.2)]
    found = [kept(rule, table, seed=seed) for rule in parts]
    assert kept(AllOf(parts), table, seed=seed) == found[0] & found[1] & found[2]
    assert kept(AllOf(parts[:1]), table, seed=seed) == found[0]


# ------------------------------------------------------------------- per category


def test_quotas_golden() -> None:
    """Half of each category: the two easiest of four in x, the easier of two in y, none of one in z with 0.4."""
    rewards = {"a": [9], "b": [8], "c": [7], "d": [6], "e": [1], "f": [0], "g": [5]}
    table = probe_table(rewards, category=[*"xxxxyy", 3])
    assert names(Easiest(0.5), table) == "abcd"
    assert names(PerCategory(Easiest(0.5)), table) == "abeg"
    assert names(PerCategory(Easiest(0.4)), table) == "abe"
    assert names(PerCategory(Hardest(0.5)), table) == "cdfg"
    assert names(PerCategory(HighestRewardStd(1.0)), table) == "abcdefg"


@QUICK
@given(REWARDS, st.integers(0, 99))
def test_each_category_gives_its_own_share(rewards: Mapping[str, Sequence[float]], seed: int) -> None:
    table = categorised(rewards)
    found = Counter(name[0] for name in kept(PerCategory(Easiest(0.3)), table, seed=seed))
    sizes = Counter(name[0] for name in rewards)
    assert found == +Counter({key: Easiest(0.3).size(size, iteration=0) for key, size in sizes.items()})


def test_a_category_has_its_own_responses_and_history() -> None:
    seen: list[tuple[str, list[float], list[float]]] = []

    class Looking(Selection):
        def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
            responses = table.responses
            of_first = responses.rewards[responses.of(0)].tolist()
            seen.append(("".join(table.prompt_ids), of_first, table.history[0]["difficulty"].tolist()))
            return torch.ones(len(table), dtype=torch.bool)

    table = probe_table({"a": [1, 2], "b": [3], "c": [4, 5, 6]}, kind=[*"xyx"])
    earlier = StatisticsTable(table.prompt_ids, {"difficulty": torch.tensor([7.0, 8.0, 9.0])})
    table = StatisticsTable(
        table.prompt_ids,
        table.columns,
        read_responses=table.read_responses,
        read_history=lambda: (earlier,),
        read_metadata=table.read_metadata,
    )
    PerCategory(Looking(), "kind").select(table.taken(torch.tensor([2, 1, 0])), iteration=0, seed=0)
    assert seen == [("ca", [4, 5, 6], [9, 7]), ("b", [3], [8])]


def test_pairs_of_a_category() -> None:
    table = pair_table("aabb", gap=[1, 2, 3, 4], difficulty=[0, 0, 1, 1])
    table = StatisticsTable(table.prompt_ids, table.columns, read_metadata=lambda name: tuple("xxyy"))
    assert kept(PerCategory(Easiest(0.5)), table) == Counter("ab")


# ------------------------------------------------------------ states, controls, errors


class Counting(Selection):
    """Keeps every row; knows how often it was asked, and what it was told."""

    requires = ("gap",)
    prompt_fields = ("topic",)

    def __init__(self) -> None:
        self._asked = 0
        self._told: list[str] = []

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        self._asked += 1
        return torch.ones(len(table), dtype=torch.bool)

    def setup(self, prompts: StatisticsTable) -> None:
        self._told.append("setup")

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        self._told.append(f"observe {iteration}")

    def metrics(self) -> dict[str, float]:
        return {"asked": float(self._asked)}

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked = state["asked"]


@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (lambda rule: AllOf([Easiest(0.5), rule]), "1"),
        (lambda rule: PerCategory(rule), "selection"),
        (lambda rule: MatchedRandom(rule), "selection"),
        (lambda rule: AllOf([All(), MatchedRandom(rule)]), "1/selection"),
    ],
)
def test_states_and_news_are_handed_on(wrap: Callable[[Selection], Selection], part: str) -> None:
    inner, again = Counting(), Counting()
    rule, copy = wrap(inner), wrap(again)
    assert "gap" in rule.requires
    assert "topic" in rule.prompt_fields
    table = categorised({"a": [0], "b": [1]})
    rule.setup(table)
    rule.observe(table, iteration=3)
    assert inner._told == ["setup", "observe 3"]
    rule.select(table, iteration=0, seed=0)
    assert inner._asked > 0
    assert rule.metrics() == {f"{part}/asked": float(inner._asked)}
    copy.load_state_dict(rule.state_dict())
    assert again._asked == inner._asked
    assert copy.state_dict() == rule.state_dict()


def test_what_wrapped_rules_read_is_known() -> None:
    assert AllOf([Easiest(0.5), HighestPVar(0.5), Hardest(0.5)]).requires == ("difficulty", "responses")
    assert PerCategory(RandomFraction(0.5), "topic").prompt_fields == ("topic",)
    assert AllOf([PerCategory(All(), "x"), PerCategory(All(), "y")]).prompt_fields == ("x", "y")
    assert AllPairs().prompt_fields == ()


@QUICK
@given(REWARDS, st.integers(0, 99))
def test_a_matched_control_has_the_size_and_does_not_see_the_rewards(
    rewards: Mapping[str, Sequence[float]], seed: int
) -> None:
    rule = MatchedRandom(RewardBand(0.25, 0.5))
    table = probe_table(rewards)
    found = kept(rule, table, seed=seed)
    assert found.total() == kept(rule.selection, table, seed=seed).total()
    if len(table):
        share = found.total() / len(table)
        assert not share or found == kept(RandomFraction(share), table, seed=seed)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HighestPVar(0), "HighestPVar.fraction=0 must lie in (0, 1]"),
        (lambda: HighestRewardGap([0.5, 2]), "HighestRewardGap.fraction=[0.5, 2] must lie in (0, 1]"),
        (lambda: HighestLearnability(0.5, math.nan), "HighestLearnability.threshold=nan must be finite"),
        (lambda: RewardBand(math.inf, 1), "RewardBand.target=inf must be finite"),
        (lambda: RewardBand(0, -1), "RewardBand.width=-1 must be at least 0 and finite"),
        (lambda: RIP(0, 1.5, 0), "RIP.length_quantile=1.5 must lie in [0, 1]"),
        (lambda: RIPThresholds(0, 1, 0), "RIPThresholds.max_gap=0 must be positive"),
        (lambda: AllOf([]), "AllOf.selections=[] must hold at least one selection"),
    ],
)
def test_bad_arguments(build: Callable[[], Selection], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def test_a_table_without_metadata_says_so() -> None:
    with pytest.raises(
        UserError, match=r"^this table has no 'category' of the prompts: name what a rule reads"
    ):
        PerCategory(All()).select(PAIRS, iteration=0, seed=0)


# ----------------------------------------------------------------------- overlap


def mask(*rows: int, total: int = 6) -> Tensor:
    found = torch.zeros(total, dtype=torch.bool)
    found[list(rows)] = True
    return found


def test_jaccard_golden() -> None:
    assert jaccard(mask(0, 1, 2), mask(2, 3)) == 1 / 4
    assert jaccard(mask(0, 1), mask(2, 3)) == 0
    assert jaccard(mask(), mask()) == 1
    assert jaccard(mask(), mask(1)) == 0


@QUICK
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_jaccard_is_a_symmetric_share(rows: list[tuple[bool, bool]]) -> None:
    first, second = (torch.tensor([row[place] for row in rows], dtype=torch.bool) for place in (0, 1))
    assert 0 <= jaccard(first, second) == jaccard(second, first) <= 1
    assert jaccard(first, first) == 1


def test_overlaps_golden() -> None:
    """The easiest half of SPREAD is a, b; of standard deviation and gap b, c; the hardest half is c, d."""
    found = overlaps(SPREAD, Easiest(0.5).select(SPREAD, iteration=0, seed=7), iteration=0, seed=7)
    assert {name: found[name] for name in ("Easiest", "Hardest", "HighestRewardStd", "HighestRewardGap")} == {
        "Easiest": 1,
        "Hardest": 0,
        "HighestRewardStd": 1 / 3,
        "HighestRewardGap": 1 / 3,
    }
    assert found["HighestPVar"] == 1 / 3
    assert found["RandomFraction"] in (0, 1 / 3, 1)


@QUICK
@given(REWARDS, st.integers(1, 9), st.integers(0, 99))
def test_a_rule_overlaps_with_itself_fully(
    rewards: Mapping[str, Sequence[float]], tenths: int, seed: int
) -> None:
    table = probe_table(rewards)
    for rule in (Easiest, Hardest, HighestRewardStd, HighestRewardGap, RandomFraction):
        chosen = rule(tenths / 10).select(table, iteration=1, seed=seed)
        found = overlaps(table, chosen, iteration=1, seed=seed)
        assert found[rule.__name__] == 1
        assert all(0 <= share <= 1 for share in found.values())


def test_a_rule_that_cannot_score_every_prompt_is_left_out() -> None:
    table = with_responses(SPREAD, {"a": [1, 2], "b": [0, 1]})
    assert "HighestPVar" not in overlaps(table, mask(0, total=4), iteration=0, seed=0)
    assert "HighestPVar" in overlaps(SPREAD, mask(0, total=4), iteration=0, seed=0)
