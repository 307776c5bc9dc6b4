"""Same seed, same run: again, resumed, with several processes, or in other batches."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
from support.processes import run_command
from support.runs import cli_arguments

from sppo_lightning.__main__ import main

WritePrompts = Callable[..., Path]


class InterruptedRunError(RuntimeError):
    """Stands for whatever ends a run."""


class StopAt(pl.Callback):
    """Ends the run at the start of training step ``step``."""

    step = 10**9

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == StopAt.step:
            raise InterruptedRunError


def files(run: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    found = sorted(run.glob(pattern))
    assert found
    return {str(path.relative_to(run)): pq.read_table(path, partitioning=None).to_pylist() for path in found}


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return state


def metrics(run: Path) -> list[dict[str, str]]:
    """All but times and memory."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
            for row in csv.DictReader(file)
        ]


def assert_same_run(one: Path, other: Path) -> None:
    for pattern in (
        "iterations/*/rollouts/*.parquet",
        "iterations/*/pairs.parquet",
        "evaluations/*/*.parquet",
    ):
        assert files(one, pattern) == files(other, pattern)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def arguments(tiny_policy: Path, counting_prompts: Path) -> Callable[..., list[str]]:
    def build(root: Path, **changes: Any) -> list[str]:
        settings = {
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "trainer__callbacks": '[{"class_path": "sppo_lightning.callbacks.DifficultyReestimation"}]',
            **changes,
        }
        return ["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)]

    return build


@pytest.fixture(scope="module")
def whole(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    main(arguments(root))
    return root


def test_same_seed_gives_the_same_run_and_another_seed_another(
    whole: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    main(arguments(tmp_path / "again"))
    assert_same_run(whole, tmp_path / "again")
    main(arguments(tmp_path / "other", seed_everything=7))
    pattern = "iterations/000/rollouts/*.parquet"
    assert files(whole, pattern) != files(tmp_path / "other", pattern)


def test_batch_sizes_change_no_response(
    whole: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    main(arguments(tmp_path / "run", data__batch_size=4, data__generator__batch_size=3))
    pattern = "iterations/000/rollouts/*.parquet"
    assert files(whole, pattern) == files(tmp_path / "run", pattern)


@pytest.mark.parametrize("step", [0, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 3))])
def test_interrupted_and_resumed_equals_uninterrupted(
    whole: Path, arguments: Callable[..., list[str]], tmp_path: Path, step: int, monkeypatch: Any
) -> None:
    """Two iterations of two or three steps: the run ends before, inside and after the first checkpoint."""
    total = len([row for row in metrics(whole) if row["train/loss"]])
    assert total > step
    monkeypatch.setattr(StopAt, "step", step)
    callbacks = (
        '[{"class_path": "sppo_lightning.callbacks.DifficultyReestimation"}, '
        f'{{"class_path": "{__name__}.StopAt"}}]'
    )
    with pytest.raises(InterruptedRunError):
        main(arguments(tmp_path / "run", trainer__callbacks=callbacks))
    monkeypatch.setattr(StopAt, "step", 10**9)
    main(arguments(tmp_path / "run", trainer__callbacks=callbacks))
    assert_same_run(whole, tmp_path / "run")
    assert metrics(whole) == metrics(tmp_path / "run")


def tensor_types(value: Any) -> list[str]:
    """Dtypes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype)]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [dtype for item in inside for dtype in tensor_types(item)]


@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_a_qlora_run_with_an_8_bit_optimizer_resumes(
    arguments: Callable[..., list[str]], tmp_path: Path, carry: bool, monkeypatch: Any
) -> None:
    settings = {
        "model__policy__quantization": "nf4",
        "model__policy__lora__rank": 64,  # bitsandbytes leaves states of fewer than 4,096 weights in 32 bits
        "model__policy__lora__alpha": 64,
        "model__policy__gradient_checkpointing": True,
        "model__optimizer": "bitsandbytes.optim.PagedAdamW8bit",
        "model__carry_optimizer": carry,
        "model__reference": "initial",
        "trainer__callbacks": f'[{{"class_path": "{__name__}.StopAt"}}]',
    }
    main(arguments(tmp_path / "whole", **settings))
    first = len([row for row in metrics(tmp_path / "whole") if row["train/loss"]]) // 2
    monkeypatch.setattr(StopAt, "step", first + 1)
    with pytest.raises(InterruptedRunError):
        main(arguments(tmp_path / "run", **settings))
    states = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert bool(states[0]["state"]) is carry
    assert ("torch.uint8" in tensor_types(states)) is carry
    monkeypatch.setattr(StopAt, "step", 10**9)
    main(arguments(tmp_path / "run", **settings))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_a_finished_run_started_again_changes_nothing(
    whole: Path, arguments: Callable[..., list[str]]
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*.parquet")}
    before[whole / "metrics.csv"] = (whole / "metrics.csv").read_bytes()
    main(arguments(whole))
    assert {path: path.read_bytes() for path in before} == before


def test_a_deleted_iteration_is_not_sampled_again_from_newer_weights(
    whole: Path, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/iterations/001")
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "run"))
    assert "is gone or incomplete although the checkpoint was trained on it" in capsys.readouterr().err


METRIC = {
    "data__reward": "sppo_lightning.rewards.TorchmetricsReward",
    "data__reward__function": None,
    "data__reward__metric": "torchmetrics.text.EditDistance",
}


@pytest.mark.parametrize(
    "reward", [{}, pytest.param(METRIC, marks=pytest.mark.slow)], ids=["function", "metric"]
)
def test_two_processes_make_the_same_rollouts_and_pairs(
    arguments: Callable[..., list[str]], tmp_path: Path, reward: dict[str, Any]
) -> None:
    """Two gloo processes: same rollouts and pairs; weights equal up to the order of sums."""
    whole, root = tmp_path / "whole", tmp_path / "run"
    main(arguments(whole, **reward))
    log = tmp_path / "log"
    status = run_command(arguments(root, trainer__devices=2, trainer__strategy="ddp", **reward), 2, log=log)
    assert status == 0, log.read_text()[-3000:]
    assert files(whole, "iterations/000/rollouts/*.parquet") == files(
        root, "iterations/000/rollouts/*.parquet"
    )
    for mine, theirs in zip(
        files(whole, "iterations/000/pairs.parquet").popitem()[1],
        files(root, "iterations/000/pairs.parquet").popitem()[1],
        strict=True,
    ):
        for name, value in mine.items():
            assert theirs[name] == (pytest.approx(value, abs=1e-5) if "logp" in name else value)
    other = weights(root)
    for name, value in weights(whole).items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3)
