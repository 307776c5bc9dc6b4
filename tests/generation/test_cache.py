"""Keys and values that are written in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.sampling import EARLY, REQUESTS, sampled
from support.tiny import CONFIGS, Source, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sppo_lightning.generation import cache as cache_module
from sppo_lightning.generation.cache import ReservedLayer, reserved_cache


def states(tokens: int, rows: int = 2) -> Tensor:
    """Keys or values of new tokens, two heads of three numbers each."""
    return torch.randn(rows, 2, tokens, 3)


@contextmanager
def logits_of(model: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: found.append(output.logits.clone()))
    yield found
    handle.remove()


# ------------------------------------------------------------------------ a layer


@pytest.mark.parametrize("reserve", [0, 1, 4, 256])
def test_a_layer_returns_all_that_it_was_given(reserve: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, single tokens, several at once, and rows that are repeated, reordered and left out."""
    monkeypatch.setattr(cache_module, "RESERVE", reserve)
    torch.manual_seed(0)
    layer, plain = ReservedLayer(), DynamicLayer()
    rows = 2
    for step in [5, 1, 1, 3, 1, (0, 0, 1, 1, 1), 1, 1, 1, 1, 1, 1, (4, 0, 2), 2, 1, (1,), 1, 1]:
        if isinstance(step, tuple):
            for one in (layer, plain):
                one.reorder_cache(torch.tensor(step))
            rows = len(step)
        else:
            keys, values = states(step, rows), states(step, rows)
            found = layer.update(keys, values)
            expected = plain.update(keys, values)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        assert layer.get_seq_length() == plain.get_seq_length()
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)


def test_tokens_are_written_in_place_until_the_room_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE", 3)
    layer = ReservedLayer()
    layer.update(states(5), states(5))
    places = []
    for _ in range(9):
        keys, values = layer.update(states(1), states(1))
        places.append((keys.data_ptr(), values.data_ptr()))
    assert [places.index(place) for place in places] == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_a_prompt_takes_no_room_of_its_own() -> None:
    """Before the first new token nothing is copied: the prompt's rows are repeated first."""
    layer = ReservedLayer()
    keys, values = states(5), states(5)
    assert layer.update(keys, values) == (keys, values)


def test_what_was_returned_before_stays_as_it_was() -> None:
    layer = ReservedLayer()
    layer.update(states(2), states(2))
    keys, _ = layer.update(states(1), states(1))
    before = keys.clone()
    for _ in range(3):
        layer.update(states(1), states(1))
    assert torch.equal(keys, before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_full_attention_is_replaced(kind: str) -> None:
    plain, found = DynamicCache(config=CONFIGS[kind]), reserved_cache(CONFIGS[kind])
    assert len(found.layers) == len(plain.layers) == 2
    for one, other in zip(found.layers, plain.layers, strict=True):
        assert type(one) is (ReservedLayer if type(other) is DynamicLayer else type(other))
    assert any(type(one) is ReservedLayer for one in found.layers) == (kind not in ("mistral", "gemma3"))


# ------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("reserve", [2, 256])
@pytest.mark.parametrize("kind", CONFIGS)
def test_sampling_is_that_of_transformers_own_cache_bit_for_bit(
    kind: str, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows leave the batch on the way; float32."""
    source = Source(tiny_model(kind), EARLY)
    monkeypatch.setattr(cache_module, "RESERVE", reserve)
    with logits_of(source.model) as found:
        reserved = sampled(source, REQUESTS, max_new_tokens=20)

    def plain(config: Any) -> DynamicCache:
        return DynamicCache(config=config)

    monkeypatch.setattr(cache_module, "reserved_cache", plain)
    with logits_of(source.model) as expected:
        assert sampled(source, REQUESTS, max_new_tokens=20) == reserved
    assert len({len(tokens) for tokens in reserved.values()}) > 4
    assert len({len(one) for one in found}) > 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
