"""A real vLLM server on loopback, on CPUs, and tiny models that it can run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.servers import unused_port

START_SECONDS = 400  # it took 26 to 214 here
# a seeded request with chunked prefill ends the engine of a CPU
FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--max-num-batched-tokens",
    "2048",
]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class VLLMServer:
    """One that may be killed and started again at the same address.

    Args:
        folder: of the model.
        flags: in addition to those that every server here gets.
        log: what it says.
    """

    folder: Path
    flags: list[str]
    log: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start without waiting until it answers."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *place, *FLAGS, *self.flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # its engine is a process of its own
            )

    def wait(self) -> None:
        """Return once it answers."""
        assert self.process is not None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        begun = time.monotonic()
        while time.monotonic() - begun < START_SECONDS:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                direct.open(self.url.replace("/v1", "/health"), timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return
        raise AssertionError(self.log.read_text()[-4000:])

    def kill(self) -> None:
        """End it and its engine at once, as a machine that goes down does."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.process = None


@contextmanager
def vllm_server(folder: Path, log: Path, *flags: str, wait: bool = True) -> Iterator[VLLMServer]:
    """Start a server and, unless told otherwise, wait for it; it ends with the context."""
    server = VLLMServer(folder, list(flags), log, unused_port())
    server.start()
    try:
        if wait:
            server.wait()
        yield server
    finally:
        if server.process is not None:
            server.kill()
