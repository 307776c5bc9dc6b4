"""The loop, run through the real command line on tiny real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import cli_arguments

from sppo_lightning.__main__ import main

WritePrompts = Callable[..., Path]


@pytest.mark.slow
def test_smoke(tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path) -> None:
    main(["fit", *cli_arguments(tiny_policy, write_prompts(), tmp_path / "run")])
    assert pq.read_table(tmp_path / "run/iterations/001/pairs.parquet").num_rows >= 4
