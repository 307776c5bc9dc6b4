"""How much of a workload fits into memory at once: a first guess, halved whenever it proves too much."""

from __future__ import annotations

import torch

CUDA_RAN_OUT = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # what accelerate does not know


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
