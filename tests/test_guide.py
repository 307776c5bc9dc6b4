"""The config parts of docs/guide.md, parsed by the real command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import cli_arguments

from sppo_lightning.__main__ import main

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)


def test_the_guide_has_blocks() -> None:
    assert len(BLOCKS) > 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(BLOCKS.index(block)))
def test_a_block_parses(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part.yaml"
    part.write_text(block)
    given = yaml.safe_load(block)
    named = {f"{part}.{key}" for part, keys in given.items() for key in keys}
    arguments = [
        argument
        for argument in cli_arguments(Path("policy"), Path("prompts.jsonl"), tmp_path)
        if ".".join(argument.lstrip("-").split("=")[0].split(".")[:2]) not in named
    ]
    with pytest.raises(SystemExit) as exit:
        main(["fit", f"--config={part}", *arguments, "--print_config"])
    assert exit.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert merged(shown, given) == shown


def merged(shown: Any, given: Any) -> Any:
    """``shown`` with all that was given put over it."""
    if isinstance(shown, dict) and isinstance(given, dict):
        return {**shown, **{key: merged(shown.get(key), value) for key, value in given.items()}}
    return given
