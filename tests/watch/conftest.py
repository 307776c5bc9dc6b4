"""Run folders to watch: one that finished, one that was killed while it trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

RECORDED = Path(__file__).parents[1] / "support" / "old_run"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run of three iterations."""
    return Path(shutil.copytree(RECORDED / "finished", tmp_path / "finished"))


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed in training of its second iteration."""
    return Path(shutil.copytree(RECORDED / "killed", tmp_path / "killed"))
