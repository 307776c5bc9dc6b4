"""What the command line fills in: precision and date, kept for a run's whole life; one resolved run folder."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.cli import main as cli
from sppo_lightning.training.precision import fast_precision


def once(policy: Path, prompts: Path, root: Path | str, **changes: object) -> list[str]:
    """Arguments of a run of one iteration that leaves the precision open."""
    settings = {"trainer__precision": None, "data__iterations": 1, **changes}
    return ["fit", *cli_arguments(policy, prompts / "train.jsonl", root, **settings)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "32-true"), ("avx512_bf16", "bf16-mixed"), ("amx_bf16", "bf16-mixed"), ("bf16", "bf16-mixed")],
)
def test_a_cpu_computes_in_what_it_is_fast_in(
    capability: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, capability: True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_precision("cpu") == fast_precision("auto") == expected
    assert fast_precision("gpu") == "bf16-mixed"  # one that is planned for


def test_precision_and_date_are_those_of_the_start(
    tiny_policy: Path,
    counting_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is resumed on another machine, on another day, is still the same run."""

    class Yesterday(date):
        @classmethod
        def today(cls) -> date:  # type: ignore[override]
            return date(2024, 2, 28)

    root = tmp_path / "run"
    monkeypatch.setattr(cli, "fast_precision", lambda accelerator: "bf16-mixed")
    monkeypatch.setattr(cli, "date", Yesterday)
    main(once(tiny_policy, counting_prompts, root))
    said = "trainer.precision=bf16-mixed: the fast one on this device, unless you set another"
    assert capsys.readouterr().err.count(said) == 1
    monkeypatch.undo()
    main(once(tiny_policy, counting_prompts, root))
    again = capsys.readouterr().err
    assert "Continuing the run in" in again
    assert "the fast one" not in again
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["policy"]["template_date"] == "2024-02-28"
    with pytest.raises(SystemExit):
        main(once(tiny_policy, counting_prompts, root, trainer__precision="32-true"))
    assert (
        "holds a run with trainer.precision='bf16-mixed', but this config has '32-true'"
        in capsys.readouterr().err
    )


def test_a_run_folder_in_the_home_folder_is_one_folder(
    tiny_policy: Path,
    counting_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lock, config, weights and checkpoints lie together, so that the same command finds them again."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RUNS", str(home))
    monkeypatch.delenv("NOWHERE", raising=False)
    main(once(tiny_policy, counting_prompts, "~/run"))
    assert list(here.iterdir()) == []
    for name in (
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "policy/config.json",
        "iterations/000",
    ):
        assert (home / "run" / name).exists()
    for root in ("~/run", "$RUNS/run"):
        with pytest.raises(SystemExit):
            main(once(tiny_policy, counting_prompts, root, model__learning_rate=0.1))
        assert "holds a run with model.learning_rate=0.001" in capsys.readouterr().err
    for root, wording in (
        ("$NOWHERE/run", "the environment variable $NOWHERE is not set"),
        ("s3://bucket/run", "is a URL: only folders and files of this machine"),
    ):
        with pytest.raises(SystemExit):
            main(once(tiny_policy, counting_prompts, root))
        assert wording in capsys.readouterr().err
    assert list(here.iterdir()) == []
