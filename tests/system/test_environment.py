"""What a run ran on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from sppo_lightning.system.environment import add_start, describe_environment, read_starts


def test_versions_and_device() -> None:
    found = describe_environment(torch.device("cpu"), processes=2, step=7)
    assert found["versions"]["torch"] == version("torch")
    assert (found["device"], found["processes"], found["step"]) == ("cpu", 2, 7)


def test_starts_are_added(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    assert read_starts(path) == []
    for step in (0, 5):
        add_start(path, {"step": step})
    assert read_starts(path) == [{"step": 0}, {"step": 5}]


def test_a_damaged_file_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text('{"starts": 3}')
    add_start(path, {"step": 1})
    assert read_starts(path) == [{"step": 1}]
