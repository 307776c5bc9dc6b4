"""Packed prompts and their token ids."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from decimal import Decimal
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.prompts.ragged import RaggedColumn
from sppo_lightning.prompts.table import EncodedPrompts, PromptTable, user_text
from sppo_lightning.types import EncodedPrompt, Message, Prompt

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # halves of surrogate pairs among them
NUMBERS = st.integers() | st.floats() | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.builds(Message, role=st.sampled_from(["user", "system", "assistant"]), content=TEXT), max_size=3
).map(tuple)
CONVERSATIONS = st.builds(Prompt, TEXT, TEXT, MESSAGES, st.none() | TEXT, st.dictionaries(TEXT, JSON))
PLAIN = CONVERSATIONS.map(lambda one: replace(one, messages=(Message(role="user", content=one.text),)))
READ = CONVERSATIONS.map(lambda one: replace(one, text=user_text(one.messages)))
PROMPTS = st.lists(CONVERSATIONS | PLAIN | READ, max_size=5)


def prompt(number: int, **changes: Any) -> Prompt:
    text = f"Name {number}"
    return replace(Prompt(f"p{number}", text, (Message(role="user", content=text),)), **changes)


def prompts(count: int) -> list[Prompt]:
    return [prompt(number) for number in range(count)]


class Level(IntEnum):
    HIGH = 3


class Name(str):
    """A text of another type."""


# ----------------------------------------------------------------------- prompts


@settings(max_examples=60, deadline=None)
@given(PROMPTS)
def test_what_goes_in_comes_out(expected: list[Prompt]) -> None:
    table = PromptTable(expected)
    assert len(table) == len(expected)
    assert repr(list(table)) == repr(expected)  # NaN is not equal to itself
    assert repr([table[row] for row in range(len(expected))]) == repr(expected)
    assert table.ids == [one.id for one in expected]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        date(2024, 2, 29),
        b"\x00\xff",
        Decimal("0.1"),
        ("a", 1),
        [("key", "of a Parquet map")],
        {1: "a number as a key"},
        {"in": {"side": {date(2024, 1, 1)}}},
        Level.HIGH,
        Name("a"),
    ],
    ids=repr,
)
def test_metadata_that_json_would_change_is_kept(value: Any) -> None:
    one = prompt(0, metadata={"plain": 1, "special": value})
    found = list(PromptTable([prompt(1), one, prompt(2)]))
    assert found == [prompt(1), one, prompt(2)]
    assert type(found[1].metadata["special"]) is type(value)


@pytest.mark.parametrize("value", [10**5000, nested(5000)], ids=["an endless number", "deep nesting"])
def test_metadata_that_json_cannot_write_is_kept(value: Any) -> None:
    table = PromptTable([prompt(0, metadata={"special": value})])
    found = table[0].metadata["special"]
    assert found is value or found == value


def test_a_mapping_that_is_no_dict_and_a_text_that_is_no_str_are_kept() -> None:
    metadata = MappingProxyType({"level": 1})
    found = PromptTable([prompt(0, metadata=metadata, answer=Name("x"))])[0]
    assert (found.metadata, type(found.answer)) == (metadata, Name)


def test_slices_are_tables_and_rows_count_from_both_ends() -> None:
    table, expected = PromptTable(prompts(5)), prompts(5)
    for part in (slice(2), slice(1, 4), slice(None, None, -2), slice(9, 12)):
        assert isinstance(table[part], PromptTable)
        assert list(table[part]) == expected[part]
    assert [table[-1], table[-5]] == [expected[4], expected[0]]
    assert list(reversed(table)) == expected[::-1]
    for row in (5, -6):
        with pytest.raises(IndexError):
            table[row]
    assert not PromptTable()


def test_rows_can_be_added_to_a_table_that_is_in_use() -> None:
    table = PromptTable(prompts(2))
    assert table[1] == prompt(1)
    table.append(prompt(2, metadata={"day": date(2024, 1, 1)}))
    table.append(prompt(3))
    assert table.ids == ["p0", "p1", "p2", "p3"]
    assert table[2].metadata == {"day": date(2024, 1, 1)}
    assert next(iter(table[2:])).metadata == {"day": date(2024, 1, 1)}


# ------------------------------------------------------------------- token ids


def encoded(count: int) -> EncodedPrompts:
    """Every second of ``2 * count`` prompts; prompt n has n tokens."""
    token_ids = RaggedColumn("i")
    for number in range(2 * count):
        token_ids.append([1000 * number] * number)
    return EncodedPrompts(PromptTable(prompts(2 * count)), token_ids, range(1, 2 * count, 2))


def expected_of(*numbers: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(prompt(number), (1000 * number,) * number) for number in numbers]


def test_prompts_with_their_token_ids() -> None:
    found = encoded(4)
    assert len(found) == 4
    assert list(found) == expected_of(1, 3, 5, 7)
    assert found[-1] == expected_of(7)[0]
    assert found.ids == ["p1", "p3", "p5", "p7"]
    with pytest.raises(IndexError):
        found[4]


def test_slices_and_parts_share_the_columns() -> None:
    found = encoded(4)
    for part, expected in ((found[1:], (3, 5, 7)), (found[::-2], (7, 3)), (found.taken([3, 0]), (7, 1))):
        assert isinstance(part, EncodedPrompts)
        assert list(part) == expected_of(*expected)
        assert part.ids == [f"p{number}" for number in expected]
        assert part._token_ids is found._token_ids
    assert list(found.taken([3, 0, 1])[1:].taken([1])) == expected_of(3)


def test_prompts_by_id() -> None:
    found = encoded(3).by_id()
    assert list(found) == ["p1", "p3", "p5"]
    assert dict(found) == dict(zip(["p1", "p3", "p5"], expected_of(1, 3, 5), strict=True))
    assert "p2" not in found
    with pytest.raises(KeyError, match="p2"):
        found["p2"]
    assert list(found.taken(["p5", "p1"])) == expected_of(5, 1)


# ------------------------------------------------------------------------ memory


def taken_bytes(make: Callable[[], object]) -> int:
    """Python's allocations that are left while the made thing is."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return left


def long_prompt(number: int) -> Prompt:
    return prompt(number, text="x" * 200, messages=(Message(role="user", content="x" * 200),))


def test_a_prompt_takes_its_text_and_little_more() -> None:
    """1,000 texts of 200 bytes, of which each is held once."""
    held = taken_bytes(lambda: PromptTable(long_prompt(number) for number in range(1000)))
    assert 200_000 < held < 300_000


def test_a_token_takes_four_bytes() -> None:
    def make() -> RaggedColumn:
        column = RaggedColumn("i")
        for row in torch.randint(1000, 150_000, (1000, 100), generator=torch.Generator().manual_seed(0)):
            column.append(row.tolist())
        return column

    assert 400_000 < taken_bytes(make) < 450_000
