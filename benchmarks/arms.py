"""Run the arms of a benchmark side by side: one process each, rounds alternating A B B A.

Only ratios within one run count: machines are noisy, and both arms see the same noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def serve(rounds: Callable[[], int], device: torch.device) -> None:
    """The process of one arm: run a round whenever a line comes in, answer with its figures.

    Args:
        rounds: runs one round and returns its tokens.
        device: whose peak memory is reported; the process's own for a CPU.
    """
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = rounds()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures = {
            "tokens": tokens,
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
        }
        print(json.dumps(figures), flush=True)


def peak_bytes() -> int:
    """Return this process's peak resident memory; unlike ``ru_maxrss``, without its parent's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Arm:
    """One arm's process: this script again, with ``--arm NAME``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, "--arm", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def round(self) -> dict[str, Any]:
        """Run one round and return its figures."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the arm {self.name!r} ended with exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def alternate(names: Sequence[str], *, rounds: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Run A B B A … in one process an arm, and return each arm's medians.

    Args:
        names: of the arms.
        rounds: measured repetitions of the palindrome, two rounds an arm each.
        warm_up: repetitions before them.
    """
    arms = [Arm(name) for name in names]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for arm in (*arms, *reversed(arms)):
            figures = arm.round()
            if number >= warm_up:
                found[arm.name].append(figures)
    for arm in arms:
        arm.close()
    return {name: _summary(rows) for name, rows in found.items()}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    rates = sorted(row["tokens"] / row["wall"] for row in rows)
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_q25": low,
        "tokens_per_s_q75": high,
        "tokens_per_cpu_s": statistics.median(row["tokens"] / row["cpu"] for row in rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "rounds": len(rows),
    }


def report(
    title: str, results: dict[str, dict[str, float]], path: Path | None, settings: dict[str, Any]
) -> None:
    """Print a table, its ratios against the last arm, and write both as JSON if asked to."""
    print(f"{title}; load {os.getloadavg()[0]:.1f}")
    print(
        f"{'arm':>12} {'tokens/s':>10} {'(quartiles)':>17} {'tokens/CPU-s':>13} {'peak MB':>9} {'ratio':>6}"
    )
    base = list(results.values())[-1]
    for name, row in results.items():
        quartiles = f"({row['tokens_per_s_q25']:.0f}-{row['tokens_per_s_q75']:.0f})"
        ratio = row["tokens_per_s"] / base["tokens_per_s"]
        print(
            f"{name:>12} {row['tokens_per_s']:>10.1f} {quartiles:>17} {row['tokens_per_cpu_s']:>13.1f} "
            f"{row['peak_bytes'] / 2**20:>9.0f} {ratio:>6.2f}",
            flush=True,
        )
    if path is not None:
        path.write_text(
            json.dumps({"title": title, "settings": settings, "results": results}, default=str, indent=2)
        )
