"""Several processes: same data and weights as one, nobody waits in a collective, one decision for all."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import cli_arguments, letter_reward
from support.same_run import rows
from torch.distributed.distributed_c10d import _set_pg_timeout

from sppo_lightning.__main__ import main
from sppo_lightning.generation import HFGenerator, PromptResponses, SampleRequest

Arguments = Callable[..., list[str]]
TIMEOUT_S = 10  # of the processes' collectives, in the test of uneven loads
LATE_S = 2 * TIMEOUT_S


class LateGenerator(HFGenerator):
    """Takes its time in the second process, once; a collective takes no longer than it may from here on."""

    late = True

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        _set_pg_timeout(timedelta(seconds=TIMEOUT_S))
        if LateGenerator.late and os.environ.get("LOCAL_RANK") == "1":
            LateGenerator.late = False
            time.sleep(LATE_S)
        yield from super().generate(requests)


def failing_reward(prompts: list[str], responses: list[str], metadata: list[Any]) -> list[float]:
    """Fails in the second process."""
    if os.environ.get("LOCAL_RANK") == "1":
        raise ValueError("this reward does not like it here")
    return letter_reward(prompts, responses, metadata)


def slow_reward(prompts: list[str], responses: list[str], metadata: list[Any]) -> list[float]:
    """Takes long enough for a signal to find it."""
    time.sleep(2.0)
    return letter_reward(prompts, responses, metadata)


def losses(run: Path) -> list[tuple[int, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [(int(row["step"]), float(row["train/loss"])) for row in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return state


def assert_same_up_to_rounding(one: Path, other: Path) -> None:
    for pattern in ("iterations/*/rollouts/*.parquet", "evaluations/*/rollouts.parquet"):
        assert rows(one, pattern) == rows(other, pattern)
    for name, mine in rows(one, "iterations/*/difficulty.parquet").items():
        assert rows(other, "iterations/*/difficulty.parquet")[name] == mine
    for (step, loss), (same, its) in zip(losses(one), losses(other), strict=True):
        assert step == same
        assert its == pytest.approx(loss, abs=1e-4)
    kept = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(kept[name], value, atol=2e-4, rtol=1e-3)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command line as a user does, with this folder's classes at hand."""
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    path = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "sppo_lightning", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def arguments(tiny_policy: Path, counting_prompts: Path) -> Arguments:
    def build(root: Path, **changes: Any) -> list[str]:
        settings = {
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "data__prompts_per_shard": 4,
            "trainer__callbacks": '[{"class_path": "sppo_lightning.callbacks.RunCheckpoint", '
            '"init_args": {"every_n_minutes": 1e-6}}]',
            **changes,
        }
        return ["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)]

    return build


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    root = tmp_path_factory.mktemp("whole")
    main(arguments(root))
    return root


TWO = {"trainer__devices": 2, "trainer__strategy": "ddp"}


@pytest.mark.slow
def test_nobody_waits_in_a_collective_for_another_to_generate(
    whole: Path, arguments: Arguments, tmp_path: Path
) -> None:
    """The second process is twice as late as a collective may take; the run is that of one process."""
    settings = {**TWO, "data__generator": "test_processes.LateGenerator"}
    status, output = ended(start(arguments(tmp_path / "run", **settings)))
    assert status == 0, output[-3000:]
    assert_same_up_to_rounding(whole, tmp_path / "run")
    assert not (tmp_path / "run/.rendezvous").exists()


def test_a_process_that_fails_ends_the_others_and_says_why(arguments: Arguments, tmp_path: Path) -> None:
    settings = {**TWO, "data__reward__function": "test_processes.failing_reward"}
    begun = time.monotonic()
    status, output = ended(start(arguments(tmp_path / "run", **settings)))
    assert status != 0
    assert "this reward does not like it here" in output
    assert "process 1 failed" in output
    assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    whole: Path, arguments: Arguments, tmp_path: Path
) -> None:
    """Two processes until the first iteration trains, one in the middle, two to the end."""
    root = tmp_path / "run"
    process = start(arguments(root, **TWO))
    wait_for((root / "checkpoints/last.ckpt").exists, process)
    process.send_signal(signal.SIGTERM)
    status, output = ended(process)
    assert status == 143, output[-3000:]
    assert "the same command resumes from there" in output
    assert 0 < len(losses(root)) < len(losses(whole))
    process = start(arguments(root))
    wait_for((root / "iterations/001/rollouts").exists, process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    status, output = ended(start(arguments(root, **TWO)))
    assert status == 0, output[-3000:]
    assert_same_up_to_rounding(whole, root)


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_of_a_terminal_and_saves(arguments: Arguments, tmp_path: Path) -> None:
    """Each worker gets it twice: from the terminal, and from the first process."""
    root = tmp_path / "run"
    process = start(arguments(root, **TWO, trainer__callbacks=None))
    wait_for(
        lambda: (root / "metrics.csv").exists() and "train/loss" in (root / "metrics.csv").read_text(),
        process,
    )
    os.killpg(process.pid, signal.SIGINT)
    status, output = ended(process)
    assert status == 130, output[-3000:]
    assert (root / "checkpoints/last.ckpt").exists()


def test_a_signal_ends_all_processes_between_two_phases(arguments: Arguments, tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(arguments(root, **TWO, data__reward__function="test_processes.slow_reward"))
    wait_for((root / "iterations/000/rollouts/probe-00000.parquet").exists, process)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, output = ended(process)
    assert status == 143, output[-3000:]
    assert time.monotonic() - begun < 30
