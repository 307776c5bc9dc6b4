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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Rounds:
    """The arm's side of the conversation: waits until a round is asked for, answers with its figures.

    For an arm whose loop is not its own, such as a trainer's callback; :func:`serve` is for the others. Make it
    before anything is loaded: from then on standard output belongs to the answers, and whatever else the process
    prints goes to standard error.

    Args:
        device: whose peak memory is reported; the process's own for a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._ready = False
        self._wall = self._cpu = 0.0

    def wait(self) -> None:
        """Return when the next round is asked for.

        Raises:
            SystemExit: if there is none left.
        """
        if not self._ready:
            self._ready = True
            self._answer({"ready": True})
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._synchronise()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def report(self, tokens: float, *, seconds: float | None = None) -> None:
        """End the round and answer with its figures.

        Args:
            tokens: what the round got done.
            seconds: what the round counts as; default: the wall time since :meth:`wait` returned.
        """
        self._synchronise()
        wall = time.perf_counter() - self._wall if seconds is None else seconds
        cuda = self.device.type == "cuda"
        self._answer(
            {
                "tokens": tokens,
                "wall": wall,
                "cpu": time.process_time() - self._cpu,
                "peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else peak_bytes(),
            }
        )

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def serve(rounds: Callable[[], float], device: torch.device) -> None:
    """The process of one arm: run a round whenever it is asked for, until none is left.

    Args:
        rounds: runs one round and returns its tokens.
        device: whose peak memory is reported; the process's own for a CPU.
    """
    line = Rounds(device)
    while True:
        line.wait()
        line.report(rounds())


def peak_bytes() -> int:
    """Return this process's peak resident memory; unlike ``ru_maxrss``, without its parent's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Arm:
    """One arm's process: this script again, with ``--arm NAME`` and further options."""

    def __init__(self, name: str, options: Sequence[str] = ()) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, *options, "--arm", name],
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


def alternate(
    names: Sequence[str], *, rounds: int, warm_up: int = 1, options: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Run A B B A … in one process an arm, and return each arm's medians.

    Args:
        names: of the arms; the last one is what the others are compared with.
        rounds: measured repetitions of the palindrome, two rounds an arm each.
        warm_up: repetitions before them.
        options: of the command line, for every arm; they win over this process's own.
    """
    arms = [Arm(name, options) for name in names]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for arm in (*arms, *reversed(arms)):
            figures = arm.round()
            if number >= warm_up:
                found[arm.name].append(figures)
    for arm in arms:
        arm.close()
    return {name: _summary(rows, found[names[-1]]) for name, rows in found.items()}


def _summary(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, float]:
    # a palindrome's rounds ran close together: its ratio suffers least from a noisy machine
    ratios = [
        one / other for one, other in zip(_palindrome_rates(rows), _palindrome_rates(base), strict=True)
    ]
    return {
        **_quartiles("tokens_per_s", [row["tokens"] / row["wall"] for row in rows]),
        **_quartiles("seconds", [row["wall"] for row in rows]),
        **_quartiles("paired_ratio", ratios),
        "tokens_per_cpu_s": statistics.median(row["tokens"] / row["cpu"] for row in rows),
        "cpu_seconds": statistics.median(row["cpu"] for row in rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "rounds": len(rows),
    }


def _palindrome_rates(rows: Sequence[dict[str, Any]]) -> list[float]:
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [(one["tokens"] + other["tokens"]) / (one["wall"] + other["wall"]) for one, other in pairs]


def _quartiles(name: str, values: Sequence[float]) -> dict[str, float]:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    )
    return {name: median, f"{name}_q25": low, f"{name}_q75": high}


def report(
    title: str,
    results: dict[str, dict[str, float]],
    path: Path | None,
    settings: dict[str, Any],
    *,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Print a table, its ratios against the last arm, and write both as JSON if asked to.

    Args:
        title: what was measured.
        results: figures of each arm, as :func:`alternate` returns them.
        path: the JSON file.
        settings: written beside the results.
        columns: further columns, from heading to the figure's key.
    """
    columns = columns or {}
    print(f"{title}; load {os.getloadavg()[0]:.1f}")
    print(
        f"{'arm':>12} {'tokens/s':>10} {'(quartiles)':>17} {'tokens/CPU-s':>13} {'peak MB':>9} {'ratio':>6}"
        + "".join(f" {heading:>{_width(heading)}}" for heading in columns)
    )
    base = list(results.values())[-1]
    for name, row in results.items():
        quartiles = f"({row['tokens_per_s_q25']:.0f}-{row['tokens_per_s_q75']:.0f})"
        ratio = row["tokens_per_s"] / base["tokens_per_s"]
        print(
            f"{name:>12} {row['tokens_per_s']:>10.1f} {quartiles:>17} {row['tokens_per_cpu_s']:>13.1f} "
            f"{row['peak_bytes'] / 2**20:>9.0f} {ratio:>6.2f}"
            + "".join(f" {row[key]:>{_width(heading)}.3g}" for heading, key in columns.items()),
            flush=True,
        )
    if path is not None:
        path.write_text(
            json.dumps({"title": title, "settings": settings, "results": results}, default=str, indent=2)
        )


def _width(heading: str) -> int:
    return max(7, len(heading))
