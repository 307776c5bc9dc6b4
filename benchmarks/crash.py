"""Kills a tiny run at random points, gives the same command again, and compares all that comes of it.

A point lies before a change of the run's folder (a file opened for writing, renamed, removed) or between two (a prompt
answered, a response scored, a pair read by the reference, a micro-batch). Each is tried from a fresh start: SIGKILL
there, then the same command to its end; then every file is compared with that of an uninterrupted run. The exit status
is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent / "tests"))


class Try(NamedTuple):
    """One kill and what came of it."""

    point: str
    phase: str
    differences: list[str]
    shards_twice: int
    steps_twice: int
    seconds_lost: float  # against the uninterrupted run, without the time that imports take


def write_policy(folder: Path) -> Path:
    """Write a 2-layer model with random weights."""
    import torch
    from support.models import byte_tokenizer, tiny_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def kill_and_go_on(crashes: Any, variant: str, at: int) -> Try:
    """Kill a run before its change number ``at``, and compare what the next one makes of it."""
    from support.crashing import phases

    _, whole = crashes.whole(variant)
    killed = crashes.run(variant, at=at)
    gone_on = crashes.go_on(variant, [killed])
    crashes.clear()
    change = whole.changes[at]
    return Try(
        f"{change.what} {change.final}",
        phases(whole.changes)[at],
        gone_on.differences if killed.status == -9 else ["was not killed"],
        len(gone_on.shards_twice),
        len(gone_on.steps_twice),
        killed.seconds + gone_on.outcome.seconds - whole.seconds,
    )


def table(tries: list[Try]) -> str:
    """Return a Markdown table by phase."""
    by_phase: dict[str, list[Try]] = defaultdict(list)
    for item in tries:
        by_phase[item.phase].append(item)
    lines = [
        "| killed in | kills | resumed equal | shards made twice | steps made twice | seconds lost, mean |",
        "|---|---|---|---|---|---|",
    ]
    for phase, found in [*sorted(by_phase.items()), ("all", tries)]:
        equal = sum(not item.differences for item in found)
        shards, steps = (
            sum(getattr(item, name) for item in found) for name in ("shards_twice", "steps_twice")
        )
        lost = sum(item.seconds_lost for item in found) / len(found)
        lines.append(f"| {phase} | {len(found)} | {equal} | {shards} | {steps} | {lost:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; leave with status 1 if a run differs."""
    from support.crash_runs import VARIANTS, Crashes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of points")
    parser.add_argument("--json", type=Path, help="write every try here")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sppo-crash-") as place:
        folder = Path(place)
        crashes = Crashes(write_policy(folder / "model"), folder)
        _, whole = crashes.whole(given.variant)
        count = len(whole.changes)
        points = sorted(random.Random(given.seed).sample(range(count), min(given.points, count)))
        tries = []
        for number, at in enumerate(points, 1):
            tries.append(kill_and_go_on(crashes, given.variant, at))
            last = tries[-1]
            print(
                f"{number}/{len(points)} {last.phase}: {last.point} {last.differences or 'equal'}",
                file=sys.stderr,
            )
        crashes.server.close()
    print(
        f"{len(tries)} of {count} points of a run of {whole.seconds:.1f} s ({given.variant}), "
        f"{time.monotonic() - begun:.0f} s\n\n{table(tries)}"
    )
    if given.json is not None:
        given.json.write_text(json.dumps([item._asdict() for item in tries], indent=1))
    if any(item.differences for item in tries):
        sys.exit(1)


if __name__ == "__main__":
    main()
