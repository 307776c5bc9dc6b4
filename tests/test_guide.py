"""The config parts of docs/guide.md, parsed by the real command line, and its classes, run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import yaml
from support.runs import cli_arguments

from sppo_lightning.__main__ import main

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/guide.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
CLASSES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(autouse=True)
def my_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The guide's classes as the module that it names, with one that is written nowhere else."""
    (tmp_path / "my_rules.py").write_text("\n\n".join(CLASSES))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rules", None)


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


@pytest.mark.filterwarnings("ignore")
def test_classes_of_ones_own_run(
    tiny_policy: Path,
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = tmp_path / "own.yaml"
    own = [block for block in BLOCKS if "my_rules." in block]
    assert len(own) >= 2
    part.write_text(yaml.safe_dump(joined(*map(yaml.safe_load, own))))
    given = yaml.safe_load(part.read_text())
    named = {f"{section}.{key}" for section, keys in given.items() for key in keys}
    # the guide's pairing wants responses that end by themselves, as few of a random model's do
    changes = {"data.generator.max_new_tokens": 12, "data.generator.stop": json.dumps([*ascii_letters])}
    changes |= {"data.pairs_per_step": 2, "data.samples_per_prompt": 8, "data.probe_samples": 8}
    arguments = [
        argument
        for argument in cli_arguments(tiny_policy, write_prompts(), tmp_path / "run", **changes)
        if ".".join(argument.lstrip("-").split("=")[0].split(".")[:2]) not in named
    ]
    main(["fit", f"--config={part}", *arguments, "--data.pairing.init_args.ratio=50"])
    assert "iteration 1: " in capsys.readouterr().out


def joined(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Several parts of a config as one."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, keys in part.items():
            found.setdefault(section, {}).update(keys)
    return found


def merged(shown: Any, given: Any) -> Any:
    """``shown`` with all that was given put over it."""
    if isinstance(shown, dict) and isinstance(given, dict):
        return {**shown, **{key: merged(shown.get(key), value) for key, value in given.items()}}
    return given
