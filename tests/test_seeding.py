"""Seeds and random keys depend on their parts, and on nothing else."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.seeding import derive_seed, distinct, random_keys

PARTS = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=6), min_size=1, max_size=4)
QUICK = settings(max_examples=50, deadline=None)


def test_derive_seed_golden() -> None:
    r"""Half of BLAKE2b-64: ``printf 'int:42\x1fint:0\x1fstr:prompt-1' | b2sum -l 64`` = 7121d4f04e9cf8c7."""
    assert derive_seed(42, 0, "prompt-1") == 0x7121D4F04E9CF8C7 >> 1


def test_derive_seed_tells_parts_apart() -> None:
    variants = [
        (1, "a"),
        ("1", "a"),
        ("a", 1),
        ("1a",),
        (1,),
        ("a",),
        (),
        ("",),
        ("", ""),
        ("ab", "c"),
        ("a", "bc"),
    ]
    assert len({derive_seed(*parts) for parts in variants}) == len(variants)


@QUICK
@given(first=PARTS, second=PARTS)
def test_seeds_are_equal_only_for_equal_parts(first: list[int | str], second: list[int | str]) -> None:
    assert derive_seed(*first) == derive_seed(*first)
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@QUICK
@given(parts=PARTS)
def test_a_seed_fits_a_torch_generator(parts: list[int | str]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_global_random_state_does_not_matter() -> None:
    before = derive_seed("a"), random_keys(["a", "b"], 1).tolist()
    random.seed(7)
    torch.manual_seed(7)
    assert (derive_seed("a"), random_keys(["a", "b"], 1).tolist()) == before


@QUICK
@given(ids=st.lists(st.text(max_size=5), max_size=12), seed=st.integers(), data=st.data())
def test_a_key_depends_on_its_own_id_only(ids: list[str], seed: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(ids))))
    keys = random_keys(ids, seed, "x")
    assert keys.dtype == torch.float64
    assert keys.shape == (len(ids),)
    assert random_keys([ids[row] for row in order], seed, "x").tolist() == keys[list(order)].tolist()


def test_keys_are_uniform_and_new_for_other_parts() -> None:
    """Of 4,000 uniform draws a decile holds 400 with a standard deviation of 19; 80 is over four of them."""
    ids = [f"prompt-{number}" for number in range(4000)]
    keys = random_keys(ids, 42, 0, "order")
    assert float(keys.min()) >= 0
    assert float(keys.max()) < 1
    counts = torch.histc(keys.float(), bins=10, min=0, max=1)
    assert float((counts - 400).abs().max()) < 80
    for other in ((43, 0, "order"), (42, 1, "order"), (42, 0, "tie")):
        moved = random_keys(ids, *other)
        assert not bool((moved == keys).any())
        assert abs(float(torch.corrcoef(torch.stack([keys, moved]))[0, 1])) < 0.08


@QUICK
@given(ids=st.lists(st.sampled_from("abc"), max_size=9))
def test_ids_that_come_again_get_a_number(ids: list[str]) -> None:
    found = distinct(ids)
    assert len(set(found)) == len(ids)
    for name in "abc":
        own = [new for new, old in zip(found, ids, strict=True) if old == name]
        assert own == [name, *(f"{name}#{number}" for number in range(1, 9))][: len(own)]
