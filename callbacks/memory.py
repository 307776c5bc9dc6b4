"""How much memory an iteration takes, phase by phase."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.callbacks.times import PhaseMeter
from sppo_lightning.system.device_memory import PeakMemory

GIB = 2**30


class PhaseMemory(PhaseMeter):
    """Logs the peak memory of each phase in GiB when an iteration ends, and says the run's when ``fit`` ends.

    ``memory/probing``, ``memory/generating``, ``memory/evaluating`` (held-out answers), ``memory/scoring``,
    ``memory/reference``, ``memory/training``, and ``memory/other`` (what lies between, such as loading, the parity
    check of the training forward, the last checkpoint and export). On a GPU what the tensors took, with
    ``memory/reserved``: the most that torch took from the device in the whole iteration; what other libraries
    allocate, and the CUDA context, come on top. On a CPU the resident memory of the process (Linux only). Of the first
    process.
    """

    def __init__(self) -> None:
        self._meter: PeakMemory | None = None
        self._peaks: dict[str, float] = {}
        self._run: dict[str, float] = {}

    def start(self, trainer: pl.Trainer) -> None:
        """Begin to watch the device."""
        self._meter = PeakMemory(trainer.strategy.root_device)

    def end_span(self, name: str) -> None:
        """Keep a span's peak if it is the largest of its phase."""
        assert self._meter is not None
        peak = self._meter.taken()
        if peak is None:
            return
        found = {name: peak.held, "reserved": peak.reserved}
        for key, size in found.items():
            if size is not None:
                self._peaks[key] = max(self._peaks.get(key, 0.0), size / GIB)

    def end_iteration(self) -> dict[str, float]:
        """Return the peaks, and forget them."""
        peaks, self._peaks = self._peaks, {}
        for name, size in peaks.items():
            self._run[name] = max(self._run.get(name, 0.0), size)
        return {f"memory/{name}": size for name, size in peaks.items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say the largest peaks of the run."""
        if self._run:
            sizes = ", ".join(f"{name} {size:.2f}" for name, size in self._run.items())
            rank_zero_info(f"Peak memory on {trainer.strategy.root_device} in GiB: {sizes}.")
