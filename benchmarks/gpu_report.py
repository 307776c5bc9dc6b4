"""Sum up in Markdown what ``gpu_check.sh`` has left in a folder so far; written there as ``results.md``."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "lightning", "peft", "accelerate", "bitsandbytes", "trl")
STATUS = {0: "passed", 124: "out of time", 137: "killed, or out of time"}
PHASES = ("evaluating", "probing", "generating", "scoring", "reference", "training", "other")


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table, an empty one behind them."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [*(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def machine() -> str:
    """Return a line on the device, its driver and the packages."""
    device = f"{platform.processor() or platform.machine()}, no GPU"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        device = "; ".join(found.splitlines()) or device
    packages = [f"{name} {installed(name)}" for name in PACKAGES]
    return f"{device}; Python {platform.python_version()}, {', '.join(packages)}."


def installed(name: str) -> str:
    """Return the version of a package that would be imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def steps(folder: Path) -> list[list[str]]:
    """Return name, exit status, seconds and limit of each step that ran."""
    file = folder / "steps.tsv"
    return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []


def said(folder: Path, name: str) -> str:
    """Return the last line that a step printed."""
    log = folder / f"{name}.log"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    last = next((line for line in reversed(lines) if line), "")
    return last.rpartition("\r")[2].replace("|", "\\|")[:120]


def metrics(file: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.csv``, empty cells left out."""
    if not file.exists():
        return []
    with file.open(newline="") as text:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(text)]


def phase_lines(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a table of the phases: seconds in all iterations, largest peak."""
    seconds: defaultdict[str, float] = defaultdict(float)
    peaks: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            kind, _, phase = name.partition("/")
            if kind == "time":
                seconds[phase] += value
            elif kind == "memory":
                peaks[phase] = max(peaks[phase], value)
    lines = []
    for phase in (*PHASES, "reserved"):
        if phase in seconds or phase in peaks:
            time = f"{seconds[phase]:.1f}" if phase in seconds else ""
            peak = f"{peaks[phase]:.2f}" if phase in peaks else ""
            lines.append([phase, time, peak])
    return table(["phase", "seconds", "peak, GiB"], lines)


def quickstart(folder: Path) -> list[str]:
    """Return what the quick start reached."""
    rows = metrics(folder / "quickstart/metrics.csv")
    rewards = [row["val/reward/mean"] for row in rows if "val/reward/mean" in row]
    if not rewards:
        return []
    reached = ", ".join(f"{reward:.3f}" for reward in rewards)
    text = f"Held-out reward, from the initial policy on: {reached}."
    return ["### Quick start", "", text, "", *phase_lines(rows)]


def qlora(folder: Path) -> list[str]:
    """Return what the QLoRA run took, beside the estimate."""
    rows = metrics(folder / "qlora.csv")
    if not rows:
        return []
    lines = ["### QLoRA, an iteration", "", *phase_lines(rows)]
    watched = folder / "device.csv"
    if watched.exists():
        used = [float(line.rpartition(",")[2]) for line in watched.read_text().splitlines() if "," in line]
        if used:
            lines += [f"Most memory in use on the device, all told: {max(used) / 1024:.2f} GiB.", ""]
    estimate = folder / "estimate.json"
    if estimate.exists():
        found = json.loads(estimate.read_text())
        heading = ["phase", "estimate, GiB", "peak, GiB", "estimate / peak"]
        cells = [
            [name, f"{row['estimate']:.2f}", f"{row['peak']:.2f}", f"{row['ratio']:.2f}"]
            for name, row in found["phases"].items()
        ]
        lines += table(heading, cells)
    return lines


def benchmark(title: str, results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the table of a benchmark's arms."""
    rows = [
        [
            name,
            f"{row['tokens_per_s']:.0f} ({row['tokens_per_s_q25']:.0f}-{row['tokens_per_s_q75']:.0f})",
            f"{row['seconds']:.3g}",
            f"{row['paired_ratio']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for name, row in results.items()
    ]
    heading = ["arm", "tokens/s (quartiles)", "s a round", "ratio to the last", "peak, GiB"]
    return [f"### {title}", "", *table(heading, rows)]


def benchmarks(folder: Path) -> list[str]:
    """Return the tables of all benchmarks that have figures."""
    lines: list[str] = []
    for name in ("rollout", "continuous", "score"):
        file = folder / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            lines += benchmark(found["title"], found["results"])
    file = folder / "train_step.json"
    if file.exists():
        found = json.loads(file.read_text())
        for size in found["sizes"]:
            lengths = "P={prompt_tokens} R={response_tokens}, {pairs} pairs".format(**size["size"])
            shape = found["settings"]["shape"]
            lines += benchmark(f"optimizer step: {shape}, {lengths}", size["results"])
    return lines


def main() -> None:
    """Write and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    ran = [
        [
            name,
            STATUS.get(int(status), f"failed ({status})"),
            f"{seconds} of {limit}",
            said(folder, name) if int(status) or name == "tests" else "",
        ]
        for name, status, seconds, limit in steps(folder)
    ]
    lines = ["## GPU", "", machine(), "", *table(["step", "outcome", "seconds", "it said"], ran)]
    lines += quickstart(folder) + qlora(folder) + benchmarks(folder)
    text = "\n".join(lines)
    (folder / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
