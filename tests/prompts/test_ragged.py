"""Rows of different lengths, end to end."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.prompts import ragged as ragged_module
from sppo_lightning.prompts.ragged import RaggedColumn

QUICK = settings(max_examples=50, deadline=None)
TOKENS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6)
TEXTS = st.lists(st.text(max_size=5), max_size=6)


def tokens_of(rows: list[list[int]]) -> RaggedColumn:
    column = RaggedColumn("i")
    for row in rows:
        column.append(row)
    return column


def texts_of(rows: list[str]) -> RaggedColumn:
    column = RaggedColumn("B")
    for row in rows:
        column.append(row.encode())
    return column


@QUICK
@given(TOKENS, TEXTS)
def test_what_goes_in_comes_out(tokens: list[list[int]], texts: list[str]) -> None:
    ids, words = tokens_of(tokens), texts_of(texts)
    assert (len(ids), len(words)) == (len(tokens), len(texts))
    assert [ids[row].tolist() for row in range(len(ids))] == tokens
    assert [words[row].tobytes().decode() for row in range(len(words))] == texts


@QUICK
@given(TOKENS, TEXTS, st.integers(20, 40))
def test_arrow_sees_the_same_rows(tokens: list[list[int]], texts: list[str], limit: int) -> None:
    """Also where a column is too long for the offsets of one chunk; the longest row has 20 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_module, "CHUNK_VALUES", limit)
        ids, words = tokens_of(tokens).as_arrow(), texts_of(texts).as_arrow()
    assert (ids.type, words.type) == (pa.list_(pa.int32()), pa.string())
    assert (ids.to_pylist(), words.to_pylist()) == (tokens, texts)
    for column in (ids, words):
        column.validate(full=True)


def test_a_chunk_is_as_long_as_its_offsets_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths 3, 2, 0, 5, 1 in chunks of at most 5."""
    column = texts_of(["abc", "de", "", "fghij", "k"])
    monkeypatch.setattr(ragged_module, "CHUNK_VALUES", 5)
    assert [chunk.to_pylist() for chunk in column.as_arrow().chunks] == [["abc", "de", ""], ["fghij"], ["k"]]
    monkeypatch.undo()
    assert column.as_arrow().num_chunks == 1


def test_arrow_gets_the_values_without_a_copy() -> None:
    column = tokens_of([[1] * 50_000] * 4)
    before = pa.total_allocated_bytes()
    found = column.as_arrow()
    assert pa.total_allocated_bytes() - before < 1000
    assert found.nbytes >= 800_000
    with pytest.raises(BufferError, match="exporting buffers"):
        column.append([2])


def test_a_token_id_over_31_bits_is_refused() -> None:
    with pytest.raises(OverflowError):
        tokens_of([[2**31]])
