"""The script for a machine with a GPU, rehearsed where there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.sh"
Check = Callable[..., subprocess.CompletedProcess[str]]


def environment(**changes: object) -> Mapping[str, str]:
    settings = {"DEVICE": "cpu", "SIZE": "tiny", "PYTHON": sys.executable, **changes}
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs steps in ``tmp_path``; what they leave goes into ``out`` there."""

    def run(steps: str, **changes: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, "out"],
            cwd=tmp_path,
            env=environment(STEPS=steps, **changes),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def outcomes(out: Path) -> list[tuple[str, str]]:
    rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
    return [(name, status) for name, status, *_ in rows]


@pytest.mark.slow
def test_steps_may_be_run_one_by_one_and_again(check: Check, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert check("weights", KEEP=1).returncode == 0
    weights = list(out.glob("scratch/qlora-tiny/policy/*.safetensors"))
    assert weights
    (out / "estimate.json").write_text("{}")  # of an earlier run
    failed = check("estimate", KEEP=1)
    assert failed.returncode == 1
    assert not (out / "estimate.json").exists()
    assert "has no peak of sampling" in (out / "estimate.log").read_text()
    assert outcomes(out) == [("weights", "0"), ("estimate", "1")]
    assert "| estimate | failed (1) |" in (out / "results.md").read_text()
    assert weights[0].exists()
    assert check("weights").returncode == 0
    assert outcomes(out) == [("estimate", "1"), ("weights", "0")]
    assert not weights[0].exists()


def test_unknown_steps(check: Check) -> None:
    found = check("weights qlra")
    assert found.returncode == 2
    assert "STEPS: no step is named qlra, but: tests quickstart weights" in found.stderr


@pytest.mark.slow
def test_what_a_step_has_started_ends_with_the_script(tmp_path: Path) -> None:
    child, python = tmp_path / "child", tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 300 &\necho $! >{child}\nwait\n")
    python.chmod(0o755)
    script = subprocess.Popen(
        [SCRIPT, tmp_path / "out"],
        env=environment(PYTHON=python, STEPS="weights"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (child.exists() and child.read_text().strip()):
            assert script.poll() is None
            time.sleep(0.05)
        sleeper = psutil.Process(int(child.read_text()))
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 130
        assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE
    finally:
        script.kill()


@pytest.mark.slow
def test_every_step(check: Check, tmp_path: Path) -> None:
    """With the real model: a random one earns no reward in the quick start."""
    found = check("all", MINUTES=30)
    assert found.returncode == 0, found.stdout
    out = tmp_path / "out"
    names = [
        "tests",
        "quickstart",
        "weights",
        "qlora",
        "estimate",
        "rollout",
        "continuous",
        "score",
        "train_step",
    ]
    assert outcomes(out) == [(name, "0") for name in names]
    phases = json.loads((out / "estimate.json").read_text())["phases"]
    assert set(phases) == {"sampling", "scoring", "reference", "training"}
    report = (out / "results.md").read_text()
    for heading in ("Quick start", "QLoRA, an iteration", "rollouts:", "scores:", "optimizer step: tiny"):
        assert f"### {heading}" in report
