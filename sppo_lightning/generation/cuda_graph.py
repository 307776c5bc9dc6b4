"""A step that is recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sppo_lightning.system.device_memory import ran_out
from sppo_lightning.types import first_line


class CannotRecordError(Exception):
    """A step cannot be recorded; says why."""


class RecordedStep:
    """The recorded step of one shape; a step of another shape takes its place.

    Rows only get fewer and lengths greater, so that no shape comes again.

    Args:
        device: a CUDA one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream(device)
        self._recorded: tuple[tuple[int, int], torch.cuda.CUDAGraph, Tensor] | None = None

    def replay(self, shape: tuple[int, int], step: Callable[[], Tensor]) -> Tensor:
        """Run a step, and record it before if it is of another shape than the last one.

        Args:
            shape: whatever tells steps apart that a recording does not serve both of.
            step: reads and writes tensors that stay where they are; its result does too, until the next one.

        Raises:
            CannotRecordError: if it does what a graph cannot, such as to wait for the device.
        """
        if self._recorded is None or self._recorded[0] != shape:
            # the graph before lives until this one is there: their memory is one
            self._recorded = (shape, *self._record(step))
        _, graph, logits = self._recorded
        graph.replay()
        return logits

    def _record(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _run_without_waiting(step)  # also for what comes with a first call, which cannot be recorded
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # a graph's memory comes from the device alone
            recorded = self._captured(step)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return recorded

    def _captured(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = step()
            graph.capture_end()
        except BaseException as error:  # a signal too must not leave the stream recording
            self._clear(graph)
            if not isinstance(error, Exception) or ran_out(error):
                raise
            raise CannotRecordError(first_line(error)) from error
        return graph, logits

    def _clear(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed.

        torch 2.11 leaves its allocator and its random numbers as if it still went on: the pool is let go of here, and a
        recording that succeeds brings the rest in order.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        index = self._device.index or 0
        with suppress(RuntimeError, AttributeError):  # torch did so itself, or has no such function any more
            cast(Any, torch._C)._cuda_endAllocateToPool(index, self._pool)
        with suppress(RuntimeError):
            other = torch.cuda.CUDAGraph()
            other.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._device)
            other.capture_end()


def _run_without_waiting(step: Callable[[], Tensor]) -> None:
    """Run a step that is about to be recorded.

    Raises:
        CannotRecordError: if it waits for the device; found out here, no recording has to fail.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise CannotRecordError(first_line(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _stream(device: torch.device) -> Any:
    """Return the stream that steps are recorded on: always the same one, since cuBLAS keeps a workspace for each."""
    return cast(Any, torch.cuda.Stream)(device)
