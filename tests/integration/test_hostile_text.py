"""What prompts and responses hold reaches people as text: no terminal obeys it, no viewer fetches what it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from support.runs import cli_arguments

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
PASTE = "\x1b]52;c;cm0gLXJm\x07"  # puts a text on the clipboard
IMAGE = "![a](https://example.org/spy.png)<img src=https://example.org/spy.png>"
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def command(args: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    program = [sys.executable, "-m", "sppo_lightning", *args]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )


@pytest.fixture(scope="module")
def folder(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts of an enemy, whose run's policy answers with any bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, count in (("train", 8), ("eval", 3)):
        records = [
            {"id": f"{PASTE}{name}{n}", "prompt": f"{n} {PASTE}\u202e{name} {IMAGE}\x00"}
            for n in range(count)
        ]
        records += [{"id": f"{PASTE}long", "prompt": "far too long " * 40}] if name == "train" else []
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def arguments(tiny_policy: Path, folder: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"data__iterations": 1, "data__generator__max_new_tokens": 4}
    settings |= {"data__eval_prompts": folder / "eval.jsonl", "data__max_prompt_tokens": 200}
    settings |= {"trainer__enable_progress_bar": "false", **changes}
    return cli_arguments(tiny_policy, folder / "train.jsonl", folder / "run", **settings)


def test_a_run_shows_text_and_obeys_none(tiny_policy: Path, folder: Path) -> None:
    done = command(["fit", *arguments(tiny_policy, folder)], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert r"\x1b]52;c;cm0gLXJm\x07long" in done.stderr  # the prompt that is left out
    assert r"0 \x1b]52;c;cm0gLXJm\x07\u202eeval ![a](https://" in done.stdout
    assert not COMMANDS.findall(done.stdout + done.stderr)
    samples = (folder / "run/samples.md").read_text()
    assert not COMMANDS.findall(samples)
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(samples)
    assert page.count("<tr>") == 4
    assert not re.findall("<(?:img|a|script)", page)


@pytest.mark.slow
def test_an_error_shows_text_and_obeys_none(tiny_policy: Path, folder: Path) -> None:
    twice = folder / "twice.jsonl"
    records = [{"id": "a", "prompt": "x"}, {"id": "a", f"{PASTE}": "y"}]
    twice.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = command(
        [
            "fit",
            *arguments(tiny_policy, folder, data__prompts=twice, trainer__default_root_dir=folder / "other"),
        ],
        folder,
    )
    assert done.returncode == 2
    assert r"its fields are: \x1b]52;c;cm0gLXJm\x07" in done.stderr.splitlines()[-1]
    assert not COMMANDS.findall(done.stdout + done.stderr)


@pytest.mark.slow
def test_a_terminal_of_ascii(tiny_policy: Path, folder: Path) -> None:
    done = command(["fit", *arguments(tiny_policy, folder)], folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr[-2000:]
    assert r"\xb1" in done.stdout  # mean ± standard error of the held-out rewards


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe(tiny_policy: Path, folder: Path) -> None:
    """As ``head -1`` does; no traceback, and the status that a shell knows."""
    program = [sys.executable, "-m", "sppo_lightning", "fit", *arguments(tiny_policy, folder)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        program, cwd=folder, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 141, done.stderr[-2000:]
    assert not re.search("Traceback|BrokenPipe|Exception", done.stderr)
