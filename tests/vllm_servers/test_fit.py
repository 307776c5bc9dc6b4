"""A whole run whose responses a real vLLM samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.runs import cli_arguments
from support.vllm_policies import RANK
from support.vllm_server import VLLMServer

from sppo_lightning.__main__ import main

pytestmark = pytest.mark.vllm


def test_two_iterations_with_an_adapter(
    server: VLLMServer, base: Path, tmp_path: Path, write_prompts: Callable[..., Path]
) -> None:
    place = "sppo_lightning.generation"
    changes = {
        "model__policy__lora__rank": RANK,
        "model__policy__lora__alpha": RANK,
        "data__generator": f"{place}.OpenAIServerGenerator",
        "data__generator__base_url": server.url,
        "data__generator__weight_sync": f"{place}.VLLMAdapter",
        "data__generator__weight_sync__folder": tmp_path / "adapters",
    }
    run = tmp_path / "run"
    main(["fit", *cli_arguments(base, write_prompts(), run, **changes)])
    for iteration in (0, 1):
        files = sorted((run / f"iterations/{iteration:03d}").rglob("*.parquet"))
        rows = [row for path in files if "rollouts" in str(path) for row in pq.read_table(path).to_pylist()]
        assert rows
        assert {row["drop_reason"] for row in rows} == {None}
    assert len(list((tmp_path / "adapters").iterdir())) == 1  # the last iteration's
    assert (run / "policy/adapter_model.safetensors").exists()
