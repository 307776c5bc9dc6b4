"""Compare ``sppo-lightning estimate`` with the peaks that a run of the same config had, phase by phase.

The estimate counts one response and one conversation at a time, so that is what the run should have had: a single
held-out prompt (its evaluation is what sampling is compared with) and ``batch_tokens`` of one conversation. What the
estimate adds for the allocator's gaps and the CUDA context is left out: the peaks are of tensors alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu_report import metrics

from sppo_lightning.memory.estimate import OVERHEADS

CELL = 11  # characters of a column of the estimate's table
MEASURED = {
    "sampling": "evaluating",
    "scoring": "scoring",
    "reference": "reference",
    "training": "training",
}


def table_of(printed: str) -> dict[str, dict[str, float]]:
    """Return phases, their parts and GiB from the table among the lines that the command printed.

    Raises:
        SystemExit: if there is none.
    """
    lines = iter(printed.splitlines())
    heading = next((line.split() for line in lines if line.split()[:2] == ["GiB", "sampling"]), None)
    if heading is None:
        raise SystemExit(f"the estimate has no table of phases:\n{printed}")
    phases: dict[str, dict[str, float]] = {name: {} for name in heading[1:]}
    for line in lines:
        split = len(line) - CELL * len(phases)
        part = line[:split].strip()
        for column, parts in enumerate(phases.values()):
            cell = line[split + CELL * column :][:CELL].strip()
            if cell:
                parts[part] = float(cell)
        if part == "total":
            break
    return phases


def estimated(config: Path) -> dict[str, float]:
    """Return what the tensors of each phase will take, GiB."""
    command = [sys.executable, "-m", "sppo_lightning", "estimate", "--config", str(config)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(found.stdout)
    if found.returncode:
        raise SystemExit(f"the estimate ended with exit status {found.returncode}")
    return {
        phase: parts["total"] - sum(parts.get(name, 0.0) for name in OVERHEADS)
        for phase, parts in table_of(found.stdout).items()
    }


def peaks(file: Path) -> dict[str, float]:
    """Return the largest peak of each phase in a ``metrics.csv``, GiB.

    Raises:
        SystemExit: if a phase has none.
    """
    rows = metrics(file)
    found = {
        phase: max((row.get(f"memory/{column}", 0.0) for row in rows), default=0.0)
        for phase, column in MEASURED.items()
    }
    missing = [phase for phase, peak in found.items() if not peak]
    if missing:
        raise SystemExit(f"{file} has no peak of {', '.join(missing)}: did the run end?")
    return found


def compare(estimates: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return estimate, peak and their ratio of each phase that was measured."""
    return {
        phase: {"estimate": estimates[phase], "peak": peak, "ratio": estimates[phase] / peak}
        for phase, peak in measured.items()
    }


def main() -> None:
    """Print both, and fail where they are too far apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.csv of the run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="fail if a ratio is further from 1 than this; leave it out on a CPU, where a peak is the whole process's",
    )
    settings = parser.parse_args()
    measured = peaks(settings.metrics)
    found = compare(estimated(settings.config), measured)
    for phase, row in found.items():
        print(
            f"{phase:>10} {row['estimate']:>8.2f} GiB estimated, {row['peak']:>8.2f} at most: {row['ratio']:.2f}"
        )
    if settings.json:
        settings.json.write_text(json.dumps({"tolerance": settings.tolerance, "phases": found}, indent=2))
    if settings.tolerance is not None:
        wrong = [phase for phase, row in found.items() if abs(row["ratio"] - 1) > settings.tolerance]
        if wrong:
            raise SystemExit(f"more than {settings.tolerance:.0%} apart: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
