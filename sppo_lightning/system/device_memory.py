"""How much of a workload fits into memory at once (a first guess, halved whenever it proves too much), and took."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

CUDA_RAN_OUT = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # what accelerate does not know
PROCESS = Path("/proc/self")  # what Linux tells a process about itself
RESTART_PEAK = "5"  # what clear_refs there takes for it (proc(5))


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken on ``device``, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def release(device: torch.device) -> None:
    """Give cached blocks back, so that another program or phase can take them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the memory of a device is used up."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, RuntimeError) and any(text in str(error) for text in CUDA_RAN_OUT):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


class TokenBudget:
    """The most tokens that a batch may hold: rows times the longest of them.

    Args:
        tokens: first guess, at least 1.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = max(1, tokens)

    def holds(self, rows: int, length: int) -> bool:
        """Whether ``rows`` of ``length`` tokens fit; a single row always may try."""
        return rows <= 1 or rows * length <= self.tokens

    def halve(self, rows: int, length: int) -> None:
        """Remember that ``rows`` of ``length`` tokens did not fit."""
        self.tokens = max(1, rows * length // 2)


class Peak(NamedTuple):
    """The most memory in use at one time, in bytes."""

    held: int  # of a CUDA device: by tensors; of a CPU: resident memory of this process
    reserved: int | None  # taken from a CUDA device by torch, its cached blocks included


class PeakMemory:
    """Tells stretch after stretch how much memory this process took at most; not what goes past torch's allocator.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cast(Any, torch.cuda).init()  # peaks cannot be restarted before
        self.taken()

    def taken(self) -> Peak | None:
        """Return the peak since the last call, or since this object was made, and begin anew.

        ``None`` where the system does not tell (no Linux, or a ``/proc`` that cannot be written).
        """
        if self._device.type == "cuda":
            peak = Peak(
                torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
            )
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        try:
            status = (PROCESS / "status").read_text()
            (PROCESS / "clear_refs").write_text(RESTART_PEAK)
        except OSError:
            return None
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]  # KiB
        return Peak(1024 * int(sizes[0]), None) if sizes else None
