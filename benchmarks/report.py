"""Size of a run's report, and the time to write it and to open it in Chromium.

The run is made: no model answers. Its texts are spans of the Python documentation, so that they compress as prose does.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))

SAMPLES = 4
ITERATIONS = 4
WORDS = " ".join(topics[name] for name in sorted(topics)).split()


def prose(seed: str, characters: int) -> str:
    """Return spans of the documentation, from a third to five thirds as long; the same for the same seed."""
    draw = random.Random(seed)
    length = int(characters * draw.uniform(1 / 3, 5 / 3))
    found = ""
    while len(found) < length:
        start = draw.randrange(len(WORDS))
        found += " ".join(WORDS[start : start + draw.randint(8, 25)]) + " "
    return found[:length]


def main() -> None:
    """Make a run, write its report, open it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=50_000)
    parser.add_argument("--characters", type=int, default=900, help="of a response; 900 are about 200 tokens")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--keep", type=Path, help="keep the run there")
    given = parser.parse_args()
    from support.made_runs import MadeRun

    from sppo_lightning.report.command import page_of
    from sppo_lightning.report.run_data import read_run

    with tempfile.TemporaryDirectory() as place:
        made = MadeRun(
            (given.keep or Path(place)) / "run",
            prompts=given.rollouts
            * 4
            // (SAMPLES * ITERATIONS * 3),  # half of them have all samples, half two
            held_out=200,
            iterations=ITERATIONS,
            planned=ITERATIONS,
            samples=SAMPLES,
            shard=250,
            text=lambda name: prose(name, 400),
            response=lambda prompt, iteration, sample: prose(
                f"{prompt}{iteration}{sample}", given.characters
            ),
        )
        if not made.folder.config.exists():
            made.write()
        started = time.perf_counter()
        run = read_run(made.root)
        read = time.perf_counter() - started
        content = page_of([run])
        found: dict[str, Any] = {
            "rollouts": sum(row.responses for one in run.iterations for row in one.rows),
            "MB of Parquet": sum(path.stat().st_size for path in made.root.rglob("*.parquet")) / 1e6,
            "MB of the page": len(content) / 1e6,
            "s to write": time.perf_counter() - started,
            "of which s to read": read,
            "GB at the peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
        made.folder.report.write_bytes(content)
        if given.chromium:
            found |= opened(made.folder.report, given.chromium)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}, indent=2))


def opened(page: Path, chromium: str) -> dict[str, float]:
    """Return seconds until the page is shown and until it is read to its end, and how its table scrolls."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 900})
        view.goto("about:blank")
        started = time.perf_counter()
        view.goto(page.as_uri(), wait_until="commit")
        view.wait_for_selector("html[data-ready]")
        shown = time.perf_counter() - started
        view.wait_for_load_state("load")
        whole = time.perf_counter() - started
        row = view.locator("#prompts .body .row").first
        row.scroll_into_view_if_needed()
        frames: list[float] = view.evaluate(
            """async () => {
                const view = document.querySelector("#prompts .view");
                const took = [];
                for (let step = 0; step < 120; step++) {
                    const before = performance.now();
                    view.scrollTop += 997;
                    await new Promise(requestAnimationFrame);
                    await new Promise(requestAnimationFrame);
                    took.push((performance.now() - before) / 2);
                }
                return took.sort((a, b) => a - b);
            }"""
        )
        started = time.perf_counter()
        view.locator("#prompts input[type=search]").fill("python")
        view.locator("#prompts .count", has_text=" of ").wait_for()
        searched = time.perf_counter() - started
        started = time.perf_counter()
        view.locator("#prompts .body .row").nth(3).click()
        view.wait_for_selector("dialog article")
        opening = time.perf_counter() - started
        browser.close()
    return {
        "s to first view": shown,
        "s until all is read": whole,
        "ms a frame while scrolling, median": frames[len(frames) // 2],
        "ms a frame, 95th percentile": frames[int(len(frames) * 0.95)],
        "s to search": searched,
        "s to open a prompt": opening,
    }


if __name__ == "__main__":
    main()
