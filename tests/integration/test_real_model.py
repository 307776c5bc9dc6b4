"""The shipped quick start with its real model, cut to one short iteration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sppo_lightning.__main__ import main

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / ".cache/smollm2-135m-instruct"


@pytest.mark.slow
def test_quickstart_runs_one_iteration_on_the_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    for name, count in (("train", 32), ("eval", 8)):
        lines = (ROOT / f"configs/quickstart/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:count]))
    arguments = [
        "fit",
        "--config",
        "configs/quickstart.yaml",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    arguments += [f"--data.prompts={tmp_path}/train.jsonl", f"--data.eval_prompts={tmp_path}/eval.jsonl"]
    main([*arguments, "--data.iterations=1", f"--model.policy.pretrained={MODEL}"])
    manifest = json.loads((tmp_path / "run/iterations/000/manifest.json").read_text())
    assert manifest["counts"]["selected"] == 16
    assert manifest["counts"]["pairs"] >= 4
    assert "Some answers, before and after" in capsys.readouterr().out
