"""Exact sampling by inverse CDF."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.distributions import chi_square
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sppo_lightning.generation import sampling
from sppo_lightning.generation.sampling import WIDTHS, sample_tokens

BELOW_ONE = math.nextafter(1.0, 0.0)
WARPS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 4, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.7},
]


def logits_of(*shape: int, spread: float = 1.5, seed: int = 0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def warped_by_transformers(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """``[B, V]`` float64 probabilities."""
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_are_the_exact_probabilities(warp: dict[str, Any], seed: int) -> None:
    logits = logits_of(8, seed=seed)
    drawn = sample_tokens(logits.expand(20000, -1), draws(20000, seed), **warp)
    assert chi_square(drawn, warped_by_transformers(logits[None], **warp)[0]) < 1


@pytest.mark.parametrize("warp", WARPS)
def test_an_even_grid_of_draws_gives_every_token_its_share(warp: dict[str, Any]) -> None:
    """An interval of length p holds p n points of a grid of n, one more or less."""
    logits = logits_of(8, seed=2)
    grid = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    counts = torch.bincount(sample_tokens(logits.expand(5000, -1), grid, **warp), minlength=8)
    expected = 5000 * warped_by_transformers(logits[None], **warp)[0]
    assert float((counts - expected).abs().max()) <= 1.01


def test_sampling_golden() -> None:
    """Probabilities 1/2, 1/8, 1/4, 1/8: plainly they follow each other by id; in a nucleus by size.

    A share of 0.7 needs the tokens 0 and 2, renormalised to 2/3 and 1/3.
    """
    logits = torch.tensor([4.0, 1.0, 2.0, 1.0]).log().expand(4, -1)
    plain = torch.tensor([0.0, 0.499, 0.501, 0.9999], dtype=torch.float64)
    assert sample_tokens(logits, plain, temperature=1.0, top_k=0, top_p=1.0).tolist() == [0, 0, 1, 3]
    nucleus = torch.tensor([0.0, 0.666, 0.667, 0.9999], dtype=torch.float64)
    assert sample_tokens(logits, nucleus, temperature=1.0, top_k=0, top_p=0.7).tolist() == [0, 0, 2, 2]
    assert sample_tokens(logits, nucleus, temperature=1.0, top_k=2, top_p=1.0).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (50, 1.0), (80, 1.0), (0, 0.05), (0, 0.9), (0, 0.999), (9, 0.6)]
)
def test_the_kept_tokens_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    """The middle of each token's interval gives that token, so that the sets and the shares agree."""
    logits = logits_of(50, spread=2.0, seed=seed)
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    values, ids = warped_by_transformers(logits[None], **warp)[0].sort(descending=True)
    kept = int((values > 0).sum())
    middles = (values.cumsum(-1) - values / 2)[:kept]
    found = sample_tokens(logits.expand(kept, -1), middles, **warp)
    assert found.tolist() == ids[:kept].tolist()
    ends = sample_tokens(
        logits.expand(2, -1), torch.tensor([0.0, BELOW_ONE], dtype=torch.float64), **warp
    ).tolist()
    assert ends == [ids[0], ids[kept - 1]]


@pytest.mark.parametrize("vocabulary", [WIDTHS[0] + 300, WIDTHS[1] + 500])
def test_a_nucleus_wider_than_what_is_sorted_first(vocabulary: int) -> None:
    """Nearly even logits: 95 % of the probability takes more tokens than the first widths hold.

    Every second row is so peaked that its nucleus is one token. Tokens are counted by rank, 50 at a time.
    """
    wide, narrow = logits_of(vocabulary, spread=0.2), logits_of(vocabulary, spread=0.2)
    narrow[7] = 50.0
    rows = torch.stack([wide, narrow]).repeat(1000, 1)
    found = sample_tokens(rows, draws(2000, 3), temperature=1.0, top_k=0, top_p=0.95)
    assert (found[1::2] == 7).all()
    probs = warped_by_transformers(wide[None], temperature=1.0, top_k=0, top_p=0.95)[0]
    assert int((probs > 0).sum()) > max(width for width in WIDTHS if width < vocabulary)
    bins = torch.empty(vocabulary, dtype=torch.long)
    bins[probs.argsort(descending=True)] = torch.arange(vocabulary) // 50
    kept = (probs > 0).nonzero().flatten()
    assert set(found[::2].tolist()) <= set(kept.tolist())
    assert len(found[::2].unique()) > len(kept) / 4
    shares = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, probs)
    assert chi_square(bins[found[::2]], shares) < 1


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("widths", [(1,), (2, 3), (2, 5)])
def test_the_widths_change_nothing(
    warp: dict[str, Any], widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, uniforms = logits_of(400, 8), draws(400)
    expected = sample_tokens(logits, uniforms, **warp)
    monkeypatch.setattr(sampling, "WIDTHS", widths)
    assert torch.equal(sample_tokens(logits, uniforms, **warp), expected)


@pytest.mark.parametrize("warp", [*WARPS, {"temperature": 1.0, "top_k": 7, "top_p": 1.0}])
@pytest.mark.parametrize("impossible", [[0], [5], [0, 1, 5], [2, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("low", [-math.inf, -1e4])
def test_impossible_tokens_are_never_drawn(warp: dict[str, Any], impossible: list[int], low: float) -> None:
    """Also by the first and the last possible draw, by one rounded up to 1, and where exp underflows."""
    logits = logits_of(6)
    logits[impossible] = low
    edges = torch.tensor([0.0, 5e-324, 0.25, 0.5, BELOW_ONE, 1.0], dtype=torch.float64)
    found = sample_tokens(logits.expand(len(edges), -1), edges, **warp)
    assert not set(impossible) & set(found.tolist())


def test_rows_do_not_see_each_other() -> None:
    logits, uniforms = logits_of(64, 40), draws(64)
    for warp in WARPS:
        together = sample_tokens(logits, uniforms, **warp)
        alone = [
            sample_tokens(logits[row : row + 1], uniforms[row : row + 1], **warp).item() for row in range(64)
        ]
        assert together.tolist() == alone


@pytest.mark.parametrize(
    "warp",
    [
        {"temperature": 1e-4, "top_k": 0, "top_p": 1.0},
        {"temperature": 5.0, "top_k": 1, "top_p": 1.0},
        {"temperature": 5.0, "top_k": 0, "top_p": 1e-6},
    ],
)
def test_limits_are_the_most_likely_token(warp: dict[str, Any]) -> None:
    logits = logits_of(200, 300)
    assert torch.equal(sample_tokens(logits, draws(200), **warp), logits.argmax(-1))


def test_low_precision_logits_are_read_in_float32_and_left_alone() -> None:
    logits = logits_of(100, 50).bfloat16()
    before = logits.clone()
    for warp in WARPS:
        expected = sample_tokens(logits.float(), draws(100), **warp)
        assert torch.equal(sample_tokens(logits, draws(100), **warp), expected)
    assert torch.equal(logits, before)
