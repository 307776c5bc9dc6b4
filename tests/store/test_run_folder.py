"""Where the files of a run lie."""

from __future__ import annotations

from pathlib import Path

from sppo_lightning.store.run_folder import RunFolder, remove_leftovers


def test_names_of_files_are_fixed(tmp_path: Path) -> None:
    """Other tools and older runs know them."""
    folder = RunFolder(tmp_path)
    found = {
        **{
            name: getattr(folder, name)
            for name, kind in vars(RunFolder).items()
            if isinstance(kind, property)
        },
        "iteration": folder.iteration(3).folder,
        "manifest": folder.iteration(3).manifest_path,
        "difficulty": folder.iteration(3).difficulty_path,
        "pairs": folder.iteration(3).pairs_path,
        "evaluation": folder.evaluation("test-003"),
        "kept_policy": folder.kept_policy(3),
        "kept_weights": folder.kept_weights(3),
        "export": folder.export("hf"),
        "predictions": folder.predictions("predictions-alpaca_eval.json"),
    }
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == {
        "config": "config.yaml",
        "metrics": "metrics.csv",
        "last_checkpoint": "checkpoints/last.ckpt",
        "iterations": "iterations",
        "iteration": "iterations/003",
        "manifest": "iterations/003/manifest.json",
        "difficulty": "iterations/003/difficulty.parquet",
        "pairs": "iterations/003/pairs.parquet",
        "evaluations": "evaluations",
        "evaluation": "evaluations/test-003",
        "policy": "policy",
        "best": "best",
        "gate": "gate.json",
        "kept_weights": "checkpoints/weights-003",
        "kept_policy": "policies/003",
        "export": "export-hf",
        "samples": "samples.md",
        "report": "report.html",
        "environment": "environment.json",
        "loggers": "loggers.json",
        "predictions": "predictions-alpaca_eval.json",
        "prediction_parts": "predictions-parts",
        "lock": ".lock",
        "rendezvous": ".rendezvous",
        "sampling": ".sampling",
    }


def test_what_is_there_is_found_by_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.iteration_numbers() == folder.kept_policies() == []
    for number in (0, 2, 1000):
        folder.kept_policy(number).mkdir(parents=True)
        folder.iteration(number).folder.mkdir(parents=True)
    (tmp_path / "policies" / "000.old").mkdir()
    assert sorted(folder.kept_policies()) == sorted(folder.iteration_numbers()) == [0, 2, 1000]


def test_leftovers_are_a_runs_own_temporary_files(tmp_path: Path) -> None:
    """Neither another program's, nor what lies behind a link."""
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    (elsewhere / "rollouts").mkdir(parents=True)
    shards = folder.iteration(1).shards.folder
    shards.mkdir(parents=True)
    folder.iteration(0).folder.symlink_to(elsewhere)
    folder.sampling.symlink_to(elsewhere)
    name = ".probe-00000.parquet.12.tmp"
    stay = [elsewhere / name, elsewhere / "rollouts" / name, folder.root / ".editor.tmp", shards / "a.12.tmp"]
    go = [folder.root / ".metrics.csv.7.tmp", shards / name]
    for path in (*stay, *go):
        path.touch()
    assert sorted(remove_leftovers(folder)) == sorted([*go, folder.sampling])
    assert all(path.exists() for path in stay)
    assert not any(path.exists() for path in go)
    assert not folder.sampling.is_symlink()


def test_only_plain_numbers_are_iterations(tmp_path: Path) -> None:
    for name in ("000", "1", "1²", "1a", "٣", "-1"):
        (tmp_path / "iterations" / name).mkdir(parents=True)
    assert sorted(RunFolder(tmp_path).iteration_numbers()) == [0, 1]
