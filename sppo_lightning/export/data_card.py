"""The card of a data set that left a run: what made it, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from sppo_lightning.export.card import data_settings, model_name, table, versions
from sppo_lightning.export.exporter import DataExporter
from sppo_lightning.export.stored_run import StoredRun
from sppo_lightning.text import for_markdown


def data_card(
    exporter: DataExporter, run: StoredRun, iterations: Sequence[int], contents: Iterable[str]
) -> str:
    """Return a data set's ``README.md``. It holds no paths, addresses of servers or keys of this machine.

    Args:
        exporter: that wrote the folder.
        run: that the data comes from.
        iterations: of the run.
        contents: paragraphs on what is in the folder, in Markdown.
    """
    name = for_markdown(model_name(run.policy_config.pretrained))
    sections = [
        f"---\n{yaml.safe_dump(dict(exporter.front_matter), sort_keys=False)}---",
        f"# {exporter.holds.capitalize()} of a self-play run of {name}",
        f"A policy that started as {name} answered prompts, a reward scored the answers, and pairs were made among "
        f"them, with sppo-lightning. From self-play iteration(s) {', '.join(map(str, iterations))}; those of iteration "
        "0 were sampled from the initial policy, those of a later one from the policy that the iterations before had "
        "trained.",
        "## What is in it",
        *contents,
        "## What made it",
        table(("setting", "value"), [("policy", model_name(run.policy_config.pretrained)), *_settings(run)]),
        "## Counts",
        *_counts(run, iterations),
        "## Made with",
        versions(),
    ]
    return "\n\n".join(sections) + "\n"


def _settings(run: StoredRun) -> Iterator[tuple[str, str]]:
    yield from data_settings(run.config["data"])
    yield "seed", str(run.config["seed_everything"])


def _counts(run: StoredRun, iterations: Sequence[int]) -> Iterator[str]:
    headings = ("iteration", "prompts", "selected", "with pairs", "pairs", "left out", "policy")
    dropped: Counter[str] = Counter()
    rows = []
    for number in iterations:
        manifest: Mapping[str, Any] = run.folder.iteration(number).read_manifest() or {}
        counts = manifest["counts"]
        cells = [str(counts.get(name, "")) for name in ("prompts", "selected", "paired_prompts", "pairs")]
        reasons = {**manifest["dropped"], **manifest.get("pairs_dropped", {})}
        dropped.update(reasons)
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none"
        rows.append((str(number), *cells, left_out, str(manifest.get("policy_fingerprint", ""))))
    yield table(headings, rows)
    yield (
        "“left out” counts prompts by the reason for which they gave no pair, and pairs that the pair selection left "
        "out; “policy” is a digest of the weights that answered."
    )
