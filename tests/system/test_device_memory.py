"""How much fits into memory at once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppo_lightning.system import device_memory as memory
from sppo_lightning.system.device_memory import Peak, PeakMemory, TokenBudget, free_bytes, ran_out, release

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
MIB = 2**20
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


def resident_peak(meter: PeakMemory) -> float:
    """In MiB."""
    peak = meter.taken()
    assert peak is not None
    assert peak.reserved is None
    return peak.held / MIB


@pytest.mark.skipif(not (memory.PROCESS / "clear_refs").exists(), reason="Linux tells a process's peak")
def test_the_peak_of_a_stretch_is_forgotten_in_the_next() -> None:
    """300 MiB are touched and freed again in the second of three stretches."""
    meter = PeakMemory(CPU)
    before = resident_peak(meter)
    torch.ones(300 * MIB, dtype=torch.uint8)
    during = resident_peak(meter)
    after = resident_peak(meter)
    assert 290 < during - before < 320
    assert abs(after - before) < 20


def test_the_peak_of_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's peaks are read, then restarted; before the first stretch too."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60 + device.index)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 80 + device.index)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"restart {device}")
    )
    meter = PeakMemory(torch.device("cuda", 1))
    assert calls == ["init", "restart cuda:1"]
    assert meter.taken() == Peak(held=61, reserved=81)
    assert calls == ["init", "restart cuda:1", "restart cuda:1"]


@pytest.mark.parametrize(
    "files",
    [{}, {"status": "Name:\tpython\n", "clear_refs": ""}, {"status": "VmHWM:\t  2048 kB\n"}],
    ids=["no /proc", "no peak in it", "peaks that cannot be restarted"],
)
def test_a_system_that_does_not_tell(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if "clear_refs" not in files:
        (tmp_path / "clear_refs").mkdir()  # refuses to be written
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    assert PeakMemory(CPU).taken() is None


def test_the_kernels_figure_is_in_kibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("VmPeak:\t  9999 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    assert PeakMemory(CPU).taken() == Peak(held=2 * MIB, reserved=None)
    assert (tmp_path / "clear_refs").read_text() == "5"
