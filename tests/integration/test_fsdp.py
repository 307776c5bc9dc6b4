"""Whole runs with weights sharded over two gloo processes (FSDP2 through Lightning's ModelParallelStrategy)."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from support.losses import CONFIGS, config
from support.processes import run_command
from support.runs import cli_arguments
from support.same_run import rows
from torch.distributed.checkpoint.filesystem import FileSystemReader

from sppo_lightning.__main__ import main

Arguments = Callable[..., list[str]]
STOP = 17  # exit code of a run that is killed
LORA = {"model__policy__lora__rank": 2, "model__policy__lora__alpha": 4, "model__reference": "initial"}
INITIAL = {
    "model__reference": "initial",
    "model__policy__gradient_checkpointing": True,
    "trainer__gradient_clip_val": 0.5,
}

MIXED = {
    "wpo_aligned": 1.0,
    "ld_dpo": 0.5,
    "simpo": 0.5,
    "nll": 0.25,
}  # all that a loss may ask a forward for
MIXED_LOSS = {
    "model__loss": json.dumps(
        config("CombinedLoss", losses={name: CONFIGS[name] for name in MIXED}, weights=MIXED)
    ),
    "model__loss__beta": None,
}
REVERTED = {
    "trainer__callbacks": json.dumps(
        [
            {
                "class_path": "sppo_lightning.callbacks.IterationGate",
                "init_args": {"bounds": {"val/kl/initial": -100.0}},  # no policy passes
            }
        ]
    )
}


class KilledAt(pl.Callback):
    """Ends the process, as a kill does, at the start of the training step that the environment names."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if str(trainer.global_step) == os.environ.get("KILLED_AT"):
            os._exit(STOP)


@pytest.fixture(scope="module")
def arguments(tiny_policy: Path, counting_prompts: Path) -> Arguments:
    callbacks = [{"class_path": "sppo_lightning.callbacks.DifficultyReestimation"}]
    callbacks += [{"class_path": f"{__name__}.KilledAt"}]

    def build(root: Path, **changes: Any) -> list[str]:
        settings = {
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "trainer__callbacks": json.dumps(callbacks),
            **changes,
        }
        return ["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)]

    return build


def run_sharded(
    arguments: list[str], processes: int, *, log: Path, killed_at: int | None = None, sharded: bool = True
) -> None:
    """Run a command with its weights sharded over processes."""
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": processes, "tensor_parallel_size": 1},
    }
    more = [f"--trainer.devices={processes}", f"--trainer.strategy={json.dumps(strategy)}"] if sharded else []
    environment = {} if killed_at is None else {"KILLED_AT": str(killed_at)}
    status = run_command([*arguments, *more], processes, log=log, **environment)
    assert status == (0 if killed_at is None else STOP), log.read_text()[-3000:]


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one: Path, other: Path) -> None:
    """Rollouts, selection and pairs to the bit; log-probs, losses and weights but for the order of sums."""
    for pattern in (
        "iterations/*/rollouts/*.parquet",
        "iterations/*/difficulty.parquet",
        "evaluations/*/*.parquet",
    ):
        assert rows(one, pattern) == rows(other, pattern)
    pairs, others = (rows(run, "iterations/*/pairs.parquet") for run in (one, other))
    assert pairs.keys() == others.keys()
    for name, expected in pairs.items():
        for mine, theirs in zip(expected, others[name], strict=True):
            for column, value in mine.items():
                assert theirs[column] == (pytest.approx(value, abs=1e-4) if "logp" in column else value)
    first, second = metrics(one), metrics(other)
    assert len(first) == len(second)
    compared = [name for name in first[0] if name in ("step", "epoch", "train/loss", "train/lr")]
    compared += [name for name in first[0] if name.startswith(("train/logps", "val/", "iteration/"))]
    for mine, theirs in zip(first, second, strict=True):
        for name in compared:
            expected = pytest.approx(float(mine[name]), abs=1e-4) if mine[name] else ""  # type: ignore[assignment]
            assert (float(theirs[name]) if theirs[name] else "") == expected, (name, mine["step"])
    (weights,) = (one / "policy").glob("*.safetensors")
    saved, other_saved = load_file(weights), load_file(other / "policy" / weights.name)
    assert saved.keys() == other_saved.keys()
    for name, value in saved.items():
        torch.testing.assert_close(other_saved[name], value, atol=1e-4, rtol=1e-3)
    if (one / "policy/config.json").exists():
        assert (other / "policy/config.json").read_text() == (one / "policy/config.json").read_text()
    assert not (other / ".sampling").exists()


def fingerprints(run: Path) -> list[str]:
    """Of the initial policy and the first reference."""
    manifest = json.loads((run / "iterations/000/manifest.json").read_text())
    return [manifest["policy_fingerprint"], manifest["reference_fingerprint"]]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(MIXED_LOSS, id="full"),
        pytest.param(INITIAL, id="initial", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param(REVERTED, id="reverted", marks=pytest.mark.slow),
    ],
)
def test_two_processes_that_share_the_weights_make_the_run_of_one(
    arguments: Arguments, tmp_path: Path, settings: dict[str, Any]
) -> None:
    main(arguments(tmp_path / "whole", **settings))
    run_sharded(arguments(tmp_path / "sharded", **settings), 2, log=tmp_path / "log")
    assert_same_run(tmp_path / "whole", tmp_path / "sharded")
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_a_killed_run_is_resumed_with_as_many_processes_or_fewer(
    arguments: Arguments, tmp_path: Path, carry: bool
) -> None:
    """From the end of the first iteration, with and without the optimizer's state."""
    settings = {"model__carry_optimizer": carry, **LORA}
    main(arguments(tmp_path / "whole", **settings))
    steps = len([row for row in metrics(tmp_path / "whole") if row["train/loss"]])
    run_sharded(arguments(tmp_path / "two", **settings), 2, log=tmp_path / "log", killed_at=steps - 1)
    checkpoint = tmp_path / "two/checkpoints/last.ckpt"
    held = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert any(".exp_avg" in name for name in held) is carry
    assert all("lora_" in name for name in held if name.startswith("state_dict."))
    assert torch.load(checkpoint / "meta.pt", weights_only=True)["global_step"] < steps
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for name, processes in (("two", 2), ("one", 1)):
        run_sharded(arguments(tmp_path / name, **settings), processes, log=tmp_path / "log")
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_an_unsharded_run_is_resumed_with_sharded_weights(arguments: Arguments, tmp_path: Path) -> None:
    """A single file without an optimizer's state is taken over."""
    main(arguments(tmp_path / "whole"))
    steps = len([row for row in metrics(tmp_path / "whole") if row["train/loss"]])
    again = arguments(tmp_path / "sharded")
    run_sharded(again, 1, log=tmp_path / "log", killed_at=steps - 1, sharded=False)
    run_sharded(again, 2, log=tmp_path / "log")
    assert_same_run(tmp_path / "whole", tmp_path / "sharded")
