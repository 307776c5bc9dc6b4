"""How much fits into memory at once."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppo_lightning.memory import TokenBudget, free_bytes, ran_out, release

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
COUNTS = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("rows", "length", "fits"),
    [(2, 50, True), (2, 51, False), (100, 1, True), (101, 1, False), (3, 33, True)],
)
def test_a_budget_holds_rows_times_length(rows: int, length: int, fits: bool) -> None:
    assert TokenBudget(100).holds(rows, length) is fits


def test_a_single_row_may_always_try() -> None:
    assert TokenBudget(1).holds(1, 10_000)
    assert not TokenBudget(1).holds(2, 1)


@pytest.mark.parametrize("guess", [0, -7])
def test_the_budget_is_at_least_one_token(guess: int) -> None:
    """The memory may be full when the guess is made."""
    assert TokenBudget(guess).tokens == 1


@given(st.integers(2, 10_000), COUNTS, COUNTS)
def test_what_did_not_fit_is_not_tried_again(rows: int, length: int, spare: int) -> None:
    tokens = rows * length + spare
    budget = TokenBudget(tokens)
    assert budget.holds(rows, length)
    budget.halve(rows, length)
    assert 1 <= budget.tokens < tokens
    assert not budget.holds(rows, length)
    assert budget.holds(rows // 2, length)


@given(COUNTS, COUNTS)
def test_halving_ends_at_a_single_row(rows: int, length: int) -> None:
    budget, tries = TokenBudget(rows * length), 0
    while rows > 1:
        budget.halve(rows, length)
        rows = max(number for number in range(1, rows + 1) if budget.holds(number, length))
        tries += 1
    assert tries <= 14  # two to the power of 14 are more than all rows


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
        ),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_a_full_device_is_told(error: Exception) -> None:
    assert ran_out(error)


def test_full_host_memory_is_told() -> None:
    """The allocator's own words; no machine has 2**60 bytes."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(error.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(),
        RuntimeError(3, "CUDA out of memory."),
        KeyboardInterrupt("CUDA out of memory."),
        SystemExit(1),
    ],
    ids=repr,
)
def test_other_errors_are_others(error: BaseException) -> None:
    assert not ran_out(error)


def test_free_memory_of_the_host() -> None:
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


def test_free_memory_of_a_gpu_includes_what_the_allocator_holds_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Free 100 of the device; 70 are held in this process, of which 30 are in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_bytes(CUDA) == 140


def test_cached_blocks_are_given_back_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    release(CPU)
    assert calls == []
    release(CUDA)
    assert calls == ["emptied"]
