"""The shipped quick start with its real model: cut to one short iteration, and with settings that collapsed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sppo_lightning.__main__ import main
from sppo_lightning.evaluation.gate import read_decisions
from sppo_lightning.evaluation.results import held_out_results
from sppo_lightning.store.run_folder import RunFolder

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


@pytest.mark.slow
def test_settings_that_collapsed_end_no_lower_than_they_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO alone, in float32, seed 1: on one processor its second iteration fell below the initial policy.

    With a gate that lets nothing fall, the policy that the run has at its end is no worse than the initial one.
    """
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    gate = {"class_path": "sppo_lightning.callbacks.IterationGate", "init_args": {"tolerance": 0.0}}
    loss = {"class_path": "sppo_lightning.losses.DPOLoss", "init_args": {"beta": 0.1}}
    settings = {
        "seed_everything": 1,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.precision": "32-true",
        "trainer.callbacks": json.dumps([gate]),
        "model.loss": json.dumps(loss),
        "model.learning_rate": 3e-5,
        "model.policy.pretrained": MODEL,
    }
    main(
        [
            "fit",
            "--config",
            "configs/quickstart.yaml",
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
    )
    folder = RunFolder(tmp_path / "run")
    results = {item.finished: item.reward for item in held_out_results(folder, 3)}
    decisions = read_decisions(folder)
    assert len(decisions) == 3
    assert results[decisions[-1].policy] >= results[0]
    assert (folder.policy / "model.safetensors").exists()
