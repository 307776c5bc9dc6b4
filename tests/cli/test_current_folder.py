"""What of the current folder is imported: the user's own modules, and nothing that a library looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from sppo_lightning.__main__ import main; main()"
OPTIONAL = ("numexpr", "bottleneck", "odf", "wandb", "comet_ml", "flash_attn", "apex", "litlogger")


def test_a_config_finds_its_modules_there_and_libraries_do_not(tmp_path: Path) -> None:
    """As the installed command runs: its own folder, and not the current one, stands first on the path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/command.py").write_text(PROGRAM)
    work, model = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    for name in OPTIONAL:
        (work / f"{name}.py").write_text(f"print('imported {name}', flush=True)\n")
    (work / "kindness.py").write_text("WORDS = ['please']\n")
    (work / "praise.py").write_text(
        "import kindness\n"
        "def praise(prompts, responses, metadata):\n"
        "    return [len(kindness.WORDS)] * len(responses)\n"
        "print('found praise', flush=True)\n"
    )
    (work / "odd.parquet").write_text("no table")
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    args = cli_arguments(model, work / "odd.parquet", work / "run", data__reward__function="praise.praise")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, tmp_path / "bin/command.py", "fit", *args],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "odd.parquet: cannot be read as Parquet" in done.stderr.splitlines()[-1]
    assert done.stdout == "found praise\n"
