"""A whole study with a tiny model: shared responses, a failed arm, a changed file, a signal, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.studies import EASY, KilledStudies, write_study

from sppo_lightning.__main__ import main

TESTS = Path(__file__).parent.parent


@pytest.fixture
def study_file(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A study of two arms, and of one that cannot run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    nowhere = {"class_path": "sppo_lightning.selection.Nowhere"}
    arms = {
        "all": {},
        "broken": {"config": {"data": {"selection": nowhere}}},
        "easy": {"config": {"data": {"selection": EASY}}},
    }
    return write_study(tmp_path, tiny_policy, counting_prompts, arms=arms)


def test_a_study_from_its_start_to_its_tables(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = ["study", "--config", str(study_file)], tmp_path / "out"
    with pytest.raises(SystemExit):
        main(arguments)
    assert "1 of 3 runs failed" in capsys.readouterr().err  # and the one after it has run
    states = {path.stem: json.loads(path.read_text()) for path in (out / "state").glob("*/*/*.json")}
    assert {arm: state["status"] for arm, state in states.items()} == {
        **{"all": "ended", "broken": "failed", "easy": "ended"}
    }
    assert "Nowhere" in states["broken"]["message"]

    log = (out / "logs/base/seed-1/easy.log").read_text()
    assert "6 responses were found in" in log  # to the held-out prompts
    assert "28 responses were found in" in log  # the probe
    rollouts = [
        pq.read_table(sorted((out / f"runs/base/seed-1/{arm}/iterations/000/rollouts").glob("probe-*")))
        for arm in ("all", "easy")
    ]
    assert rollouts[0].equals(rollouts[1])
    assert not (out / "runs/base/seed-1/easy/checkpoints").exists()

    arms = pq.read_table(out / "arms.parquet").to_pylist()
    assert {row["arm"]: row["seeds"] for row in arms} == {"all": 1, "easy": 1}
    assert arms[0]["tokens"] > arms[1]["tokens"]
    page = (out / "README.md").read_text()
    first = out / "runs/base/seed-1/easy/iterations/000/rollouts"  # what it shares with the arm before it
    shared = sum(len(ids) for path in first.iterdir() for ids in pq.read_table(path)["token_ids"].to_pylist())
    assert f"of which {shared:,} (" in page
    topped_up = sum(pq.read_metadata(path).num_rows for path in first.glob("topup-*"))
    assert f"{topped_up} responses were found in" in log
    assert "2 of 3 runs have ended, 1 without a result" in page
    assert "one seed" in page

    main([*arguments, "--action", "status"])
    assert "2 of 3 runs have ended, 1 failed" in capsys.readouterr().out
    study_file.write_text(study_file.read_text().replace("Easy beats all.", "All beats easy."))
    with pytest.raises(SystemExit):
        main(arguments)
    assert "whose claims was named otherwise before it ran" in capsys.readouterr().err


def started(command: list[str], then: Path) -> subprocess.Popen[bytes]:
    """Start a study, and return once a file is there."""
    process = subprocess.Popen(command)
    until = time.monotonic() + 300
    while not then.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_study_that_is_killed_or_stopped_is_continued(study_file: Path, tmp_path: Path) -> None:
    """Killed, not asked to stop: its run is asked by the kernel, and is waited for by the next start."""
    content = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**content, "arms": {"all": {}}, "claims": {}}))
    command = [sys.executable, "-m", "sppo_lightning", "study", "--config", str(study_file)]
    out = tmp_path / "out"
    stopped = started(command, out / "logs/base/seed-1/all.log")
    stopped.terminate()
    assert stopped.wait(timeout=300) == 128 + signal.SIGTERM
    killed = started(command, out / "runs/base/seed-1/all/iterations/000/manifest.json")
    killed.kill()
    killed.wait()
    assert not (out / "state").exists()
    assert subprocess.run(command, check=False, timeout=300).returncode == 0
    ended = (out / "logs/base/seed-1/all.log").read_bytes()
    assert subprocess.run(command, check=False, timeout=300).returncode == 0
    assert (out / "logs/base/seed-1/all.log").read_bytes() == ended  # it is not run again
    assert pq.read_table(out / "arms.parquet").column("arm").to_pylist() == ["all"]
    assert (
        "Continuing the run" not in (out / "logs/base/seed-1/all.log").read_text()
    )  # no step had been taken


@pytest.mark.slow
def test_a_study_that_is_killed_at_random_points_gives_the_same_tables(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path
) -> None:
    studies = KilledStudies(tmp_path, tiny_policy, counting_prompts, seed=0)
    found = studies.round(["all", "study", "fit"])
    assert len(found.kills) == 3
    assert found.differences == []
