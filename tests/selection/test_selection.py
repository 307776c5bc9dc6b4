"""Schedules, selections and curricula."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.selection import (
    All,
    AllPairs,
    AllPrompts,
    Band,
    Curriculum,
    DisjointSplits,
    DropHardest,
    Easiest,
    EasyToHard,
    Fraction,
    Hardest,
    HardToEasy,
    RandomFraction,
    RandomOrder,
    RandomSubset,
    Schedule,
    Selection,
)

QUICK = settings(max_examples=50, deadline=None)
FRACTIONS = st.floats(0, 1, exclude_min=True)


def table_of(difficulty: Sequence[float], ids: Sequence[str] | None = None) -> StatisticsTable:
    names = tuple(ids or (f"p{number}" for number in range(len(difficulty))))
    return StatisticsTable(names, {"difficulty": torch.tensor(difficulty, dtype=torch.float64)})


def kept(rule: Selection, table: StatisticsTable, *, iteration: int = 0, seed: int = 42) -> set[str]:
    mask = rule.select(table, iteration=iteration, seed=seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(table),)
    return {prompt_id for prompt_id, keep in zip(table.prompt_ids, mask.tolist(), strict=True) if keep}


@st.composite
def tables(draw: st.DrawFn) -> StatisticsTable:
    """Up to 12 prompts whose difficulties often tie."""
    ids = draw(st.lists(st.text(max_size=4), unique=True, max_size=12))
    return table_of([draw(st.sampled_from([-1.5, 0.0, 0.25, 3.0])) for _ in ids], ids)


@st.composite
def bands(draw: st.DrawFn) -> Band:
    low, high = sorted(draw(st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True)))
    return Band(low / 20, high / 20)


FRACTION_RULES: list[Callable[[Fraction], Selection]] = [Easiest, Hardest, DropHardest, RandomFraction]
RULES = st.one_of(
    st.builds(lambda rule, fraction: rule(fraction), st.sampled_from(FRACTION_RULES), FRACTIONS),
    bands(),
    st.sampled_from([All(), AllPairs()]),
)


# --------------------------------------------------------------- selections


def test_selections_golden() -> None:
    """Ten prompts with mean rewards 3 1 4 1.5 9 2 6 5 3.5 8: by rank, hardest first, 1 3 5 0 8 2 7 6 9 4."""
    table = table_of([3, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 8])
    expected: list[tuple[Selection, str]] = [
        (Easiest(0.3), "6 9 4"),
        (Hardest(0.3), "1 3 5"),
        (DropHardest(0.3), "0 8 2 7 6 9 4"),
        (Band(0.2, 0.5), "5 0 8"),
        (All(), "0 1 2 3 4 5 6 7 8 9"),
        (AllPairs(), "0 1 2 3 4 5 6 7 8 9"),
        (Easiest(1), "0 1 2 3 4 5 6 7 8 9"),
        (Hardest(0.01), ""),
    ]
    for rule, numbers in expected:
        assert kept(rule, table) == {f"p{number}" for number in numbers.split()}, type(rule).__name__


@QUICK
@given(rule=RULES, table=tables(), iteration=st.integers(0, 3), seed=st.integers(0, 99), data=st.data())
def test_selection_is_permutation_equivariant_and_deterministic(
    rule: Selection, table: StatisticsTable, iteration: int, seed: int, data: st.DataObject
) -> None:
    before = kept(rule, table, iteration=iteration, seed=seed)
    torch.manual_seed(data.draw(st.integers(0, 9)))
    shuffled = table.rows(data.draw(st.permutations(table.prompt_ids)))
    assert kept(rule, shuffled, iteration=iteration, seed=seed) == before
    assert kept(rule, table, iteration=iteration, seed=seed) == before
    assert len(before) == rule.size(len(table), iteration=iteration)


@QUICK
@given(table=tables(), fraction=FRACTIONS, seed=st.integers(0, 99))
def test_drop_hardest_complements_hardest(table: StatisticsTable, fraction: float, seed: int) -> None:
    dropped, rest = kept(Hardest(fraction), table, seed=seed), kept(DropHardest(fraction), table, seed=seed)
    assert not dropped & rest
    assert dropped | rest == set(table.prompt_ids)


@QUICK
@given(table=tables(), data=st.data())
def test_easiest_and_hardest_partition(table: StatisticsTable, data: st.DataObject) -> None:
    total = len(table) or 1
    count = data.draw(st.integers(1, total))
    easy, hard = kept(Easiest(count / total), table), set(table.prompt_ids)
    if count < total:
        hard = kept(Hardest(1 - count / total), table)
        assert not easy & hard
    assert easy | hard == set(table.prompt_ids)


@QUICK
@given(table=tables(), parts=st.integers(1, 5), seed=st.integers(0, 99))
def test_bands_partition(table: StatisticsTable, parts: int, seed: int) -> None:
    """Quartiles among them; each band is easier than the one before."""
    found = [kept(Band(part / parts, (part + 1) / parts), table, seed=seed) for part in range(parts)]
    assert Counter(prompt_id for part in found for prompt_id in part) == Counter(table.prompt_ids)
    filled = [table.rows(sorted(part))["difficulty"] for part in found if part]
    assert all(float(low.max()) <= float(high.min()) for low, high in pairwise(filled))


def test_quartiles_of_ten_golden() -> None:
    """The edges 0, 2.5, 5, 7.5, 10 round half up to 0, 3, 5, 8, 10."""
    quartiles = [Band(part / 4, (part + 1) / 4) for part in range(4)]
    assert [rule.size(10, iteration=0) for rule in quartiles] == [3, 2, 3, 2]
    assert [len(kept(rule, table_of(range(10)))) for rule in quartiles] == [3, 2, 3, 2]


@QUICK
@given(table=tables(), fraction=FRACTIONS)
def test_the_hardest_band_is_hardest_and_the_easiest_band_is_drop_hardest(
    table: StatisticsTable, fraction: float
) -> None:
    assert kept(Band(0, fraction), table) == kept(Hardest(fraction), table)
    if fraction < 1:
        assert kept(Band(fraction, 1), table) == kept(DropHardest(fraction), table)


@QUICK
@given(table=tables(), fraction=FRACTIONS, seed=st.integers(0, 99))
def test_no_prompt_left_out_is_easier_than_one_that_easiest_keeps(
    table: StatisticsTable, fraction: float, seed: int
) -> None:
    keep = kept(Easiest(fraction), table, seed=seed)
    out = sorted(set(table.prompt_ids) - keep)
    if keep and out:
        assert float(table.rows(sorted(keep))["difficulty"].min()) >= float(
            table.rows(out)["difficulty"].max()
        )


@QUICK
@given(table=tables(), fraction=FRACTIONS, seed=st.integers(0, 99))
def test_random_fraction_does_not_see_the_difficulty(
    table: StatisticsTable, fraction: float, seed: int
) -> None:
    blind = table_of([0.0] * len(table), table.prompt_ids)
    assert kept(RandomFraction(fraction), table, seed=seed) == kept(
        RandomFraction(fraction), blind, seed=seed
    )


@pytest.mark.parametrize("rule", [Easiest(0.25), Hardest(0.25), DropHardest(0.75), RandomFraction(0.25)])
@pytest.mark.parametrize("by", ["seed", "iteration"])
def test_ties_are_settled_evenly_and_anew_for_each_seed_and_iteration(rule: Selection, by: str) -> None:
    """Each of 8 tied prompts is kept 2 times in 8: of 400 draws 100, standard deviation 8.7."""
    table = table_of([1.0] * 8)
    counts = Counter(key for number in range(400) for key in kept(rule, table, **{by: number}))
    assert all(60 < counts[key] < 140 for key in table.prompt_ids)


def test_a_list_of_fractions_is_one_for_each_iteration_and_the_last_repeats() -> None:
    table = table_of(range(10))
    for build in FRACTION_RULES:
        rule = build([0.5, 0.2, 0.1])
        sizes = [len(kept(rule, table, iteration=iteration)) for iteration in range(5)]
        assert sizes == ([5, 8, 9, 9, 9] if build is DropHardest else [5, 2, 1, 1, 1])
        assert sizes == [rule.size(10, iteration=iteration) for iteration in range(5)]


@pytest.mark.parametrize(
    ("fraction", "total", "size"),
    [
        (0.3, 10, 3),
        (0.5, 5, 3),
        (0.145, 100, 15),
        (0.29, 100, 29),
        (0.3, 1, 0),
        (0.5, 1, 1),
        (1, 7, 7),
        (0.3, 0, 0),
    ],
)
def test_sizes_round_half_up(fraction: float, total: int, size: int) -> None:
    """0.145 * 100 is 14.499999999999998 in floating point, and still a half."""
    assert Easiest(fraction).size(total, iteration=0) == size
    assert Hardest(fraction).size(total, iteration=0) == size
    assert RandomFraction(fraction).size(total, iteration=0) == size
    assert Band(0, fraction).size(total, iteration=0) == size
    assert DropHardest(fraction).size(total, iteration=0) == total - size


def test_rules_name_the_columns_that_they_read() -> None:
    for rule in (Easiest(0.3), Hardest(0.3), DropHardest(0.3), Band(0, 1)):
        assert rule.requires == ("difficulty",)
    for rule in (All(), AllPairs(), RandomFraction(0.3)):
        assert rule.requires == ()
        assert len(kept(rule, StatisticsTable(("a",), {}))) <= 1


def test_a_rule_of_ones_own_need_not_know_its_size() -> None:
    class Positive(Selection):
        def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
            return table["difficulty"] > 0

    assert Positive().size(3, iteration=0) is None
    assert kept(Positive(), table_of([-1, 1])) == {"p1"}


@pytest.mark.parametrize("build", [*FRACTION_RULES, RandomSubset])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, [], [0.5, 0], [0.5, 2], float("nan")])
def test_bad_fraction(build: type, fraction: Fraction) -> None:
    message = re.escape(f"{build.__name__}.fraction={fraction} must lie in (0, 1]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(fraction)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 0.5), (0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1)]
)
def test_bad_band(low: float, high: float) -> None:
    message = re.escape(f"Band(low={low}, high={high}) must satisfy 0 <= low < high <= 1")
    with pytest.raises(ValueError, match=f"^{message}$"):
        Band(low, high)


# ---------------------------------------------------------------- schedules

IDS = st.lists(st.text(max_size=4), unique=True, max_size=14)


def candidates(
    schedule: Schedule, ids: Sequence[str], iteration: int = 0, *, iterations: int = 3, seed: int = 42
) -> list[str]:
    return schedule.candidates(ids, iteration=iteration, iterations=iterations, seed=seed)


@QUICK
@given(
    schedule=st.sampled_from([AllPrompts(), DisjointSplits(), RandomSubset(0.4), RandomSubset([0.2, 0.9])]),
    ids=IDS,
    iteration=st.integers(0, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_schedules_choose_the_same_prompts_in_any_order_and_keep_that_order(
    schedule: Schedule, ids: list[str], iteration: int, seed: int, data: st.DataObject
) -> None:
    chosen = set(candidates(schedule, ids, iteration, seed=seed))
    shuffled = data.draw(st.permutations(ids))
    found = candidates(schedule, shuffled, iteration, seed=seed)
    assert found == [prompt_id for prompt_id in shuffled if prompt_id in chosen]
    if isinstance(schedule, AllPrompts):
        assert found == shuffled


@QUICK
@given(ids=IDS, iterations=st.integers(1, 5), seed=st.integers(0, 99))
def test_disjoint_splits_partition_evenly(ids: list[str], iterations: int, seed: int) -> None:
    parts = [
        candidates(DisjointSplits(), ids, number, iterations=iterations, seed=seed)
        for number in range(iterations)
    ]
    assert Counter(prompt_id for part in parts for prompt_id in part) == Counter(ids)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_splits_are_random() -> None:
    ids = [f"p{number}" for number in range(30)]
    splits = {tuple(candidates(DisjointSplits(), ids, seed=seed)) for seed in range(5)}
    assert len(splits) == 5


def test_random_subset_is_drawn_anew_in_each_iteration() -> None:
    ids = [f"p{number}" for number in range(40)]
    subsets = [candidates(RandomSubset([0.5, 0.25]), ids, number) for number in range(4)]
    assert [len(subset) for subset in subsets] == [20, 10, 10, 10]
    assert len(set(map(tuple, subsets))) == 4
    assert candidates(RandomSubset(0.5), ids, seed=1) != candidates(RandomSubset(0.5), ids, seed=2)


# ---------------------------------------------------------------- curricula


def in_order(curriculum: Curriculum, difficulty: Sequence[float], keys: Sequence[float]) -> list[int]:
    rows = curriculum.order(
        torch.tensor(difficulty, dtype=torch.float64), torch.tensor(keys, dtype=torch.float64)
    )
    return rows.tolist()


def test_curricula_golden() -> None:
    """Rows 0 and 3 tie; row 3 has the lower key."""
    difficulty, keys = [2, 5, 1, 2], [0.9, 0.1, 0.5, 0.3]
    assert in_order(EasyToHard(), difficulty, keys) == [1, 3, 0, 2]
    assert in_order(HardToEasy(), difficulty, keys) == [2, 3, 0, 1]
    assert in_order(RandomOrder(), difficulty, keys) == [1, 3, 2, 0]


def test_ties_among_many_rows_go_by_key() -> None:
    """A sort that is not stable shows only beyond a few dozen rows."""
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.randint(3, (500,), generator=generator).tolist()
    keys = torch.rand(500, generator=generator, dtype=torch.float64).tolist()
    for curriculum, sign in ((EasyToHard(), -1), (HardToEasy(), 1)):
        expected = sorted(range(500), key=lambda row: (sign * difficulty[row], keys[row]))
        assert in_order(curriculum, difficulty, keys) == expected


@QUICK
@given(
    curriculum=st.sampled_from([RandomOrder(), EasyToHard(), HardToEasy()]),
    rows=st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 2.0]), st.floats(0, 1)),
        unique_by=lambda row: row[1],
        max_size=12,
    ),
    data=st.data(),
)
def test_curricula_are_sorted_permutations_whatever_the_order_of_rows(
    curriculum: Curriculum, rows: list[tuple[float, float]], data: st.DataObject
) -> None:
    sign = {RandomOrder: 0, EasyToHard: -1, HardToEasy: 1}[type(curriculum)]
    expected = sorted(rows, key=lambda row: (sign * row[0], row[1]))
    for arranged in (rows, data.draw(st.permutations(rows))):
        order = in_order(curriculum, [row[0] for row in arranged], [row[1] for row in arranged])
        assert sorted(order) == list(range(len(rows)))
        assert [arranged[row] for row in order] == expected


# ------------------------------------------------------- several pairs of a prompt


@pytest.mark.parametrize("rule", [RandomFraction(0.5), Easiest(0.5)])
def test_pairs_of_one_prompt_are_chosen_each_for_itself(rule: Selection) -> None:
    """Of 40 pairs with one difficulty, 10 a prompt, some of each prompt go: 2 to 8 within four standard deviations."""
    ids = [f"p{number % 4}" for number in range(40)]
    mask = rule.select(table_of([1.0] * 40, ids), iteration=0, seed=1)
    kept = Counter(prompt_id for prompt_id, keep in zip(ids, mask.tolist(), strict=True) if keep)
    assert kept.total() == 20
    assert all(1 < kept[f"p{number}"] < 9 for number in range(4))


def test_what_a_rule_keeps_is_nothing_unless_it_says_so() -> None:
    for rule in (All(), AllPrompts(), RandomOrder()):
        assert rule.state_dict() == {}
        rule.load_state_dict({})
