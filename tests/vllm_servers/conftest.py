"""One real server for all tests that leave it as it was: a start takes from half a minute to some minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import byte_tokenizer
from support.vllm_policies import LIMIT, RANK, save_base
from support.vllm_server import VLLMServer, vllm_server

FLAGS = ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2", "--max-model-len", str(LIMIT)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that is served."""
    return save_base(tmp_path_factory.mktemp("base"), byte_tokenizer())


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Another one."""
    log = tmp_path_factory.mktemp("log") / "vllm"
    with vllm_server(base, log, *FLAGS) as found:
        yield found


@pytest.fixture(scope="session")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A server of the base model that takes adapters; it may be killed, and has to be there again after."""
    log = tmp_path_factory.mktemp("log") / "vllm"
    with vllm_server(base, log, *FLAGS) as found:
        yield found
