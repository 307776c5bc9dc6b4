"""Studies of tiny models, and what comes of one that is killed again and again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import pyarrow.parquet as pq
import yaml
from support.same_run import differences

TESTS = Path(__file__).parent.parent
EASY = {"class_path": "sppo_lightning.selection.Easiest", "init_args": {"fraction": 0.6}}
CLAIM = {"text": "Easy beats all.", "arm": "easy", "against": "all"}
TABLES = ("prompts.parquet", "arms.parquet", "verdicts.parquet")
WITH_A_RUN = ("runs", "responses", "logs", "configs", "study.json", ".registration.lock")
"""What changes in a study's folder before a run and while it runs."""
Victim = Literal["all", "study", "fit"]
"""What a SIGKILL ends: the study and its run, as where a machine goes down; the study alone; the run alone."""


def write_study(folder: Path, policy: Path, prompts: Path, **changes: Any) -> Path:
    """Write the file of a study that a laptop finishes in a minute, and return its path.

    Args:
        folder: for it, its base config and its results.
        policy: folder of the model.
        prompts: folder of ``train.jsonl`` and ``eval.jsonl``.
        changes: to the study file.
    """
    base: dict[str, Any] = {
        "trainer": {
            **{"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False}
        },
        "model": {
            "policy": {"pretrained": str(policy)},
            "reference": "previous_iteration",
            "loss": {"class_path": "sppo_lightning.losses.DPOLoss", "init_args": {"beta": 0.1}},
            "learning_rate": 1e-3,
        },
        "data": {
            "prompts": str(prompts / "train.jsonl"),
            "eval_prompts": str(prompts / "eval.jsonl"),
            **{"iterations": 1, "samples_per_prompt": 3, "probe_samples": 2, "steps_per_iteration": 2},
            "selection": {"class_path": "sppo_lightning.selection.All"},
            "generator": {
                "class_path": "sppo_lightning.generation.HFGenerator",
                "init_args": {"max_new_tokens": 8, "temperature": 1.0},
            },
            "reward": {
                "class_path": "sppo_lightning.rewards.FunctionReward",
                "init_args": {"function": "support.runs.letter_reward"},
            },
            **{"pairs_per_step": 4, "batch_size": 2},
        },
    }
    content = {
        **{"name": "tiny", "question": "Does it run?", "config": ["base.yaml"], "seeds": [1]},
        "arms": {"all": {}, "easy": {"config": {"data": {"selection": EASY}}}},
        "claims": {"c": CLAIM},
        "output": str(folder / "out"),
        **changes,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


class Kill(NamedTuple):
    """One SIGKILL."""

    victim: Victim
    after: str  # what had changed last in the study's folder


class Round(NamedTuple):
    """A study that was killed until it ended."""

    kills: list[Kill]
    differences: list[str]  # from the undisturbed one
    seconds: float


class KilledStudies:
    """A study, undisturbed and then killed at random points.

    A point comes after a number of changes in the study's folder. For every third kill, only those count that the
    study makes between two runs: how one ended, and its page and tables.

    Args:
        folder: for all files.
        policy: folder of the model.
        prompts: folder of ``train.jsonl`` and ``eval.jsonl``.
        seed: of the points.
    """

    def __init__(self, folder: Path, policy: Path, prompts: Path, *, seed: int) -> None:
        self.out = folder / "out"  # of all rounds in turn, so that no path in a file tells them apart
        self._random = random.Random(seed)
        two = {"base": {"data": {"iterations": 2}}}
        self._file = write_study(folder, policy, prompts, seeds=[1, 2], settings=two)
        self._log = folder / "output"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        begun = time.monotonic()
        study = self._start()
        self._changes = sum(1 for _ in _changes(self.out, study))
        assert study.wait() == 0, self._log.read_text()
        self.seconds = time.monotonic() - begun
        self._whole = folder / "whole"
        self.out.rename(self._whole)

    def round(self, victims: Sequence[Victim]) -> Round:
        """Give the command until it has ended, with a kill each time while there are victims left.

        Args:
            victims: of the kills, in their order.
        """
        begun, kills = time.monotonic(), list[Kill]()
        most = 10 + 2 * self._changes // len(victims)  # a start makes about 10 before it goes on
        while True:
            study = self._start()
            kill = self._kill(study, victims[len(kills)], most) if len(kills) < len(victims) else None
            status = study.wait()
            if kill is None or status == 0:
                break
            kills.append(kill)
        found = [] if status == 0 else [f"exit status {status}: {self._log.read_text()[-1000:]}"]
        found += self._differences()
        shutil.rmtree(self.out)
        return Round(kills, found, time.monotonic() - begun)

    def _start(self) -> psutil.Popen:
        command = [sys.executable, "-m", "sppo_lightning", "study", "--config", str(self._file)]
        with self._log.open("wb") as output:
            return psutil.Popen(command, env=self._environment, stdout=output, stderr=subprocess.STDOUT)

    def _kill(self, study: psutil.Popen, victim: Victim, most: int) -> Kill | None:
        """Kill after a number of changes, ``most`` at most; ``None``: the study, or the run, had ended before."""
        between = self._random.random() < 1 / 3
        left = self._random.randint(1, 12 if between else most)
        for path in _changes(self.out, study):
            left -= not between or path.parts[0] not in WITH_A_RUN
            if left > 0:
                continue
            runs = study.children(recursive=True)
            if victim == "fit" and not runs:
                continue  # between two runs
            for process in (*([study] if victim != "fit" else []), *(runs if victim != "study" else [])):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return Kill(victim, str(path))
        return None

    def _differences(self) -> list[str]:
        """Return what is not as in the undisturbed study: its page and figure by bytes, its tables, its runs."""
        found = []
        for name in ("README.md", "gains.svg"):
            one, other = ((root / name).read_bytes() for root in (self._whole, self.out))
            found += [name] if one != other else []
        for name in TABLES:
            tables = [pq.read_table(root / name) for root in (self._whole, self.out)]
            found += [] if tables[0].equals(tables[1]) else [name]
        for run in sorted((self._whole / "runs").glob("*/*/*")):
            place = run.relative_to(self._whole)
            found += [f"{place}: {what}" for what in differences(run, self.out / place)]
        return found


def _changes(folder: Path, study: psutil.Popen) -> Iterator[Path]:
    """Yield what changes in a folder, as it is seen, relative to it, until a process has ended."""
    before = dict[Path, tuple[int, int]]()
    while study.poll() is None:
        now = dict[Path, tuple[int, int]]()
        for place, folders, files in os.walk(folder):
            for path in (Path(place, name) for name in (*folders, *files)):
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    now[path] = status.st_mtime_ns, status.st_size
        for path in sorted(now.keys() | before.keys()):
            if now.get(path) != before.get(path):
                yield path.relative_to(folder)
        before = now
        time.sleep(0.02)
