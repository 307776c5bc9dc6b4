"""The report as one HTML file that loads nothing, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from sppo_lightning.report.prompt_table import PromptTable
from sppo_lightning.report.run_data import RunData
from sppo_lightning.report.text_chunks import TextChunks, packed

STYLES = ("vendor/uPlot.min.css", "style.css")
LIBRARIES = {"vendor/uPlot.iife.min.js": "vendor/uPlot.LICENSE", "vendor/diff.min.js": "vendor/diff.LICENSE"}
"""Others' scripts with their licences, which stand before them in each page."""
SCRIPTS = (
    "dom.js",
    "format.js",
    "blocks.js",
    "charts.js",
    "table.js",
    "answers.js",
    "views.js",
    "runs.js",
    "study.js",
    "app.js",
)
"""Parts of one script, in the order in which they need each other."""
FIRST = ("summary", "prompts")
"""Blocks that lie before the scripts: the page is shown before all of a large file is read."""
MEGABYTE = 1_000_000


def page(
    summary: Mapping[str, Any],
    runs: Sequence[RunData],
    *,
    max_megabytes: float,
    categories: Mapping[str, str],
) -> bytes:
    """Return the page.

    Args:
        summary: of the runs.
        runs: in its order.
        max_megabytes: texts that would make the page larger are left out, those of the oldest iterations first.
        categories: of prompts, by id.
    """
    content = packed(summary)
    rest = 200 * sum(len(one.rows) for run in runs for one in run.iterations) // 4
    budget = int(max_megabytes * MEGABYTE) - len(_fixed()[0]) - len(content) - rest
    chunks = TextChunks(budget)
    table = PromptTable(runs, chunks, categories)
    left_out = list(dict.fromkeys(table.left_out))
    blocks = {"summary": content, "prompts": packed({**table.content(), "left_out": left_out})}
    blocks |= {f"b{number}": block for number, block in enumerate(chunks.blocks)}
    title = " · ".join(run.name for run in runs) if summary["study"] is None else summary["study"]["name"]
    return render(blocks, title=title)


def render(blocks: Mapping[str, str], *, title: str) -> bytes:
    """Return a page of packed blocks by name.

    Args:
        blocks: as :func:`~sppo_lightning.report.text_chunks.packed` makes them; ``summary`` and ``prompts`` are read
            first.
        title: of the page, as it is.
    """
    template, policy = _fixed()
    parts = {name: _data(name, block) for name, block in blocks.items()}
    first = "".join(parts.pop(name) for name in FIRST if name in parts)
    marks = {
        "policy": escape(policy),
        "title": escape(_visible(title)),
        "first": first,
        "blocks": "".join(parts.values()),
    }
    return "".join(marks.get(part, part) for part in template.split("\0")).encode()


def _data(name: str, block: str) -> str:
    return f'<script type="text/plain" id="{name}">{block}</script>\n'


def _visible(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text


@cache
def _fixed() -> tuple[str, str]:
    """Return what is the same in all pages, with marks for the rest, and its content-security policy."""
    own = "\n".join(_part(name) for name in SCRIPTS)
    libraries = [f"/*\n{_part(licence)}\n*/\n{_part(name)}" for name, licence in LIBRARIES.items()]
    scripts = [*libraries, f'"use strict";\n(() => {{\n{own}\n}})();']
    style = "\n".join(map(_part, STYLES))
    assert not any("</script" in script for script in scripts)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    marks = {"style": style, "scripts": "\n".join(f"<script>{script}</script>" for script in scripts)}
    parts = re.split(r"\{\{(\w+)\}\}", _part("page.html"))
    return "\0".join(marks.get(part, part) for part in parts), policy


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    text = (files("sppo_lightning.report") / "page" / name).read_text(encoding="utf-8")
    return text.rstrip("\n")
