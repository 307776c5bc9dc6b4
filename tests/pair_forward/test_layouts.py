"""Where the tokens of a micro-batch stand, and where their log-probs are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from sppo_lightning.pair_forward.layouts import PairLayout, PairRows, PlainLayout, SharedLayout, SharedPrompts

QUICK = settings(max_examples=50, deadline=None)
PROMPT = st.lists(st.integers(3, 99), min_size=1, max_size=6).map(tuple)
RESPONSE = st.lists(st.integers(3, 99), max_size=6).map(tuple)
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
GOLDEN: list[Row] = [((11, 12), (21,), (31, 32)), ((13,), (22, 23, 24), (33,))]
ALIKE: list[Row] = [((11, 12), (21,), (31,)), ((13, 14), (22,), (32,))]
PLAIN, SHARED = PlainLayout(0), SharedLayout()


def laid(layout: PairLayout, pairs: list[Row]) -> PairRows:
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return layout.rows(prompts, chosen, rejected)


def shared_of(rows: PairRows) -> SharedPrompts:
    assert rows.shared is not None
    return rows.shared


# --------------------------------------------------------------------- golden


def test_plain_golden() -> None:
    """T = 4, so that row r starts at place 4 r; 21 stands at place 2 of row 0 and is predicted by place 1.

    R = 3, so that the responses' places start at 0, 3, 6 and 9.
    """
    rows = laid(PLAIN, GOLDEN)
    assert rows.input_ids.tolist() == [[11, 12, 21, 0], [13, 22, 23, 24], [11, 12, 31, 32], [13, 33, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert rows.targets.tolist() == [21, 22, 23, 24, 31, 32, 33]
    assert rows.predicting.tolist() == [1, 4, 5, 6, 9, 10, 12]
    assert rows.places.tolist() == [0, 3, 4, 5, 6, 7, 9]
    assert (rows.responses, rows.longest_response, rows.shared) == (4, 3, None)


def test_shared_golden() -> None:
    """Prompts at places 0-1 and 2, then 21, 22 23 24, 31 32, 33 at 3, 4-6, 7-8 and 9.

    Padded, two prompts of P = 2 tokens lie at 0 and 2, four responses of R = 3 at 4, 7, 10 and 13.
    """
    rows = laid(SHARED, GOLDEN)
    assert rows.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 31, 32, 33]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 2, 1, 2, 3, 2, 3, 1]]
    assert rows.targets.tolist() == [21, 22, 23, 24, 31, 32, 33]
    assert rows.predicting.tolist() == [1, 2, 4, 5, 1, 7, 2]
    assert rows.places.tolist() == [0, 3, 4, 5, 6, 7, 9]
    assert (rows.responses, rows.longest_response) == (4, 3)
    shared = shared_of(rows)
    assert shared.lengths == (2, 1, 1, 3, 2, 1)
    assert (shared.prompts, shared.responses) == ((2, 2), (4, 3))
    assert shared.prompt_lengths.tolist() == [2, 1]
    assert shared.query_starts.tolist() == [0, 2, 3, 4, 7, 9, 10]
    assert shared.key_starts.tolist() == [0, 2, 3, 6, 10, 14, 16]  # 2, 1, then 2 + 1, 1 + 3, 2 + 2, 1 + 1
    assert shared.places is not None
    assert shared.places.tolist() == [0, 1, 2, 4, 7, 8, 9, 10, 11, 13]
    assert shared.padded is not None
    assert shared.padded.tolist() == [0, 1, 2, 0, 3, 0, 0, 4, 5, 6, 7, 8, 0, 9, 0, 0]


def test_pairs_of_one_length_need_no_padding() -> None:
    shared = shared_of(laid(SHARED, ALIKE))
    assert shared.padded is None
    assert shared.places is None
    longer: list[Row] = [*ALIKE, ((13, 14), (22,), (32, 33))]
    assert shared_of(laid(SHARED, longer)).padded is not None


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_responses_without_tokens(layout: PairLayout) -> None:
    rows = laid(layout, [((11, 12), (), ())])
    assert (rows.responses, rows.longest_response) == (2, 0)
    assert rows.targets.tolist() == rows.predicting.tolist() == rows.places.tolist() == []


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_dtypes(layout: PairLayout) -> None:
    rows = laid(layout, GOLDEN)
    for ids in (rows.input_ids, rows.position_ids, rows.predicting, rows.targets, rows.places):
        assert ids.dtype == torch.long
    if rows.shared is not None:
        assert rows.shared.query_starts.dtype == rows.shared.key_starts.dtype == torch.int32


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_no_tensor_overlaps_itself(layout: PairLayout) -> None:
    """A loader that pins memory cannot copy one that does."""
    tensors = [part for part in tree_leaves(laid(layout, GOLDEN)) if isinstance(part, torch.Tensor)]
    assert len(tensors) >= 5
    for tensor in tensors:
        assert all(stride > 0 for stride in tensor.stride())


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_a_prompt_without_tokens(layout: PairLayout) -> None:
    with pytest.raises(ValueError, match=r"^prompt 1 of the micro-batch has no tokens: drop it$"):
        laid(layout, [GOLDEN[0], ((), (21,), (31,))])


# ----------------------------------------------------------------- properties

PAIRS = st.lists(st.tuples(PROMPT, RESPONSE, RESPONSE), min_size=1, max_size=4)


def sequences(pairs: list[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and response of each of the 2B sequences."""
    return [(prompt, chosen) for prompt, chosen, _ in pairs] + [(p, rejected) for p, _, rejected in pairs]


def check_reading(rows: PairRows, pairs: list[Row]) -> None:
    """What both layouts promise: every response token is read once, from the token before it."""
    flat, positions = rows.input_ids.flatten().tolist(), rows.position_ids.flatten().tolist()
    longest = max(len(response) for _, response in sequences(pairs))
    expected = [
        (
            token,
            (*prompt, *response)[len(prompt) + offset - 1],
            len(prompt) + offset - 1,
            number * longest + offset,
        )
        for number, (prompt, response) in enumerate(sequences(pairs))
        for offset, token in enumerate(response)
    ]
    predicting = rows.predicting.tolist()
    found = zip(
        rows.targets.tolist(),
        [flat[place] for place in predicting],
        [positions[place] for place in predicting],
        rows.places.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert (rows.responses, rows.longest_response) == (2 * len(pairs), longest)


@QUICK
@given(pairs=PAIRS, pad=st.integers(0, 99))
def test_plain_rows_hold_each_sequence_and_padding_behind_it(pairs: list[Row], pad: int) -> None:
    """Also where the padding token is a token of the text."""
    rows = laid(PlainLayout(pad), pairs)
    check_reading(rows, pairs)
    width = max(len(prompt) + len(response) for prompt, response in sequences(pairs))
    for number, (prompt, response) in enumerate(sequences(pairs)):
        tokens = [*prompt, *response]
        assert rows.input_ids[number].tolist() == tokens + [pad] * (width - len(tokens))
        assert rows.position_ids[number].tolist() == list(range(width))
        places = rows.predicting[(rows.predicting // width) == number]
        assert (places % width).tolist() == list(range(len(prompt) - 1, len(tokens) - 1))


@QUICK
@given(pairs=PAIRS)
def test_a_shared_row_holds_each_prompt_and_each_response_once(pairs: list[Row]) -> None:
    rows = laid(SHARED, pairs)
    check_reading(rows, pairs)
    shared, count = shared_of(rows), len(pairs)
    segments = [pair[0] for pair in pairs] + [response for _, response in sequences(pairs)]
    assert rows.input_ids.tolist() == [[token for segment in segments for token in segment]]
    assert shared.lengths == tuple(map(len, segments))
    behind = [0] * count + [len(prompt) for prompt, _ in sequences(pairs)]
    assert rows.position_ids[0].tolist() == [
        first + offset
        for first, segment in zip(behind, segments, strict=True)
        for offset in range(len(segment))
    ]
    starts, keys = shared.query_starts.tolist(), shared.key_starts.tolist()
    predicting = iter(rows.predicting.tolist())
    for number, segment in enumerate(segments):
        assert starts[number + 1] - starts[number] == len(segment)
        assert keys[number + 1] - keys[number] == len(segment) + behind[number]
        if number >= count:
            from_prompt = starts[number % count + 1] - 1
            expected = [from_prompt, *range(starts[number], starts[number + 1] - 1)][: len(segment)]
            assert [next(predicting) for _ in segment] == expected


@QUICK
@given(pairs=PAIRS)
def test_padded_segments_hold_every_token_at_its_place(pairs: list[Row]) -> None:
    shared = shared_of(laid(SHARED, pairs))
    segments = [pair[0] for pair in pairs] + [response for _, response in sequences(pairs)]
    (count, prompt), (responses, response) = shared.prompts, shared.responses
    assert (prompt, response) == (max(map(len, segments[:count])), max(map(len, segments[count:])))
    widths = [prompt] * count + [response] * responses
    assert (shared.padded is None) == (shared.places is None) == ([len(s) for s in segments] == widths)
    if shared.padded is None or shared.places is None:
        return
    places = shared.places.tolist()
    assert places == [
        sum(widths[:number]) + offset
        for number, segment in enumerate(segments)
        for offset in range(len(segment))
    ]
    assert len(shared.padded) == sum(widths)
    assert shared.padded[shared.places].tolist() == list(range(len(places)))
    assert set(shared.padded.tolist()) <= set(range(len(places)))
