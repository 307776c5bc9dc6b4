"""One real run, broken off and resumed, that logs to every tracker offline; read back and compared with metrics.csv.

Run by `make test-loggers`: W&B, MLflow and Trackio are not installed for the other tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml
from support.runs import cli_arguments
from support.trackers import (
    Stored,
    bins,
    read_csv,
    read_mlflow,
    read_tensorboard,
    read_trackio,
    read_wandb,
    values,
)

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import SelfPlayCallback
from sppo_lightning.rewards import Reward
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Prompt

PACKAGES = ("wandb", "mlflow", "trackio")  # not imported yet: Trackio would read TRACKIO_DIR
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason="needs the extra `loggers`: make test-loggers"
)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
HOSTILE = ["<script>alert(1)</script>", "\x1b]0;x\x07 \u202egnp", "![x](http://e/x.png)", "| a | b |"]


SECRET = "sk-geheim-0123"


class KeyedReward(Reward):
    """The share of lower-case letters, for which a key is asked."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [sum(map(str.islower, text)) / (len(text) + 1) for text in responses]


class BreakOff(SelfPlayCallback):
    """Ends the run once, in the second step of its second iteration."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        mark = Path(trainer.default_root_dir) / "broken-off"
        if trainer.global_step == 4 and not mark.exists():
            mark.touch()
            raise RuntimeError("broken off")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Iterator[Path]:
    """A finished run in ``run``, the trackers' files beside it."""
    import wandb

    place = tmp_path_factory.mktemp("trackers")
    os.environ["TRACKIO_DIR"] = str(place / "trackio")  # read when Trackio is imported
    for name, start, count in (("train", 0, 14), ("eval", 50, 6)):
        records = [
            {"id": f"{name}{n}", "prompt": f"Count to {start + n} {HOSTILE[n % 4]}"} for n in range(count)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lightning = "lightning.pytorch.loggers"
    mlflow = {"experiment_name": "test", "tracking_uri": f"sqlite:///{place}/mlflow.db"}
    loggers: list[tuple[str, dict[str, Any]]] = [
        (f"{lightning}.WandbLogger", {"save_dir": str(place), "offline": True}),
        (f"{lightning}.MLFlowLogger", {**mlflow, "artifact_location": str(place / "artifacts")}),
        ("sppo_lightning.loggers.TrackioLogger", {"project": "test"}),
        (f"{lightning}.TensorBoardLogger", {"save_dir": str(place), "name": "", "version": "tensorboard"}),
    ]
    config = {
        "trainer": {
            "logger": [{"class_path": path, "init_args": arguments} for path, arguments in loggers],
            "callbacks": [{"class_path": f"{__name__}.BreakOff"}],
        }
    }
    (place / "loggers.yaml").write_text(yaml.safe_dump(config))
    changes = {"data.eval_prompts": place / "eval.jsonl", "trainer.logger": None}
    changes |= {"data.reward": f"{__name__}.KeyedReward", "data.reward.function": None}
    arguments = [
        f"--config={place / 'loggers.yaml'}",
        *cli_arguments(tiny_policy, place / "train.jsonl", place / "run", **changes),
        f"--data.reward.api_key={SECRET}",
    ]
    before, sys.argv = sys.argv, ["sppo-lightning", "fit", *arguments]  # which W&B would record
    with pytest.raises(RuntimeError, match="broken off"):
        main(["fit", *arguments])
    wandb.finish()
    main(["fit", *arguments])
    wandb.finish()
    sys.argv = before
    yield place
    for name in ("TRACKIO_DIR", "WANDB_MODE", "WANDB_X_DISABLE_META"):  # the last two are set by the run
        del os.environ[name]


@pytest.fixture(scope="module")
def stored(root: Path) -> dict[str, Stored]:
    """What each tracker holds."""
    return {
        "tensorboard": read_tensorboard(root / "tensorboard"),
        "wandb": read_wandb(root),
        "mlflow": read_mlflow(f"sqlite:///{root}/mlflow.db", "test"),
        "trackio": read_trackio("test"),
    }


@pytest.mark.parametrize("name", TRACKERS)
def test_no_point_is_lost_and_only_those_before_the_break_are_repeated(
    name: str, root: Path, stored: dict[str, Stored]
) -> None:
    expected, found = Counter(read_csv(root / "run/metrics.csv")), Counter(stored[name].points)
    assert not expected - found
    measured = ("time/", "memory/", "epoch")  # seconds and bytes differ in the two starts
    repeated = [(metric, step) for metric, step, _ in found - expected if not metric.startswith(measured)]
    assert {step for _, step in repeated} <= {3, 4}
    again = {item for item in found - expected if not item[0].startswith(measured)}
    assert again <= set(expected)


@pytest.mark.parametrize("name", TRACKERS)
def test_tables_hold_the_answers_as_text(name: str, root: Path, stored: dict[str, Stored]) -> None:
    tables = stored[name].tables
    assert sorted(tables) == [3, 6]
    if name == "tensorboard":
        text = tables[6][0][0]
        assert "&lt;script>" in text
        assert "<script>" not in text
        assert "!\\[x](http" in text
        return
    assert len(tables[6]) == 6
    prompts = [row[0] for row in tables[6]]
    assert prompts[0] == "Count to 50 <script>alert(1)</script>"
    assert prompts[1] == "Count to 51 \\x1b]0;x\\x07 \\u202egnp"
    rewards = [row[4] for row in tables[6]]
    reward = values(read_csv(root / "run/metrics.csv"), "val/reward/mean")[-1]
    assert np.mean(rewards) == pytest.approx(reward, rel=1e-4)


@pytest.mark.parametrize("name", TRACKERS)
def test_histograms_hold_every_value(name: str, root: Path, stored: dict[str, Stored]) -> None:
    stores = [RunFolder(root / "run").iteration(number) for number in (0, 1)]
    rewards = [sum(map(len, store.shards.rewards().values())) for store in stores]
    difficulties = [len(store.read_difficulty()[0]) for store in stores]
    assert bins(stored[name].histograms) == {
        "iteration/difficulty": difficulties,
        "iteration/reward": rewards,
    }


def test_both_starts_log_to_one_run_of_each_tracker(root: Path) -> None:
    from mlflow.tracking import MlflowClient
    from trackio.api import Api

    runs = {item["logger"]: item["run"] for item in json.loads((root / "run/loggers.json").read_text())}
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [(run.info.run_id, run.info.status) for run in found] == [(runs["MLFlowLogger"], "FINISHED")]
    assert [run.name for run in Api().runs("test")] == [runs["TrackioLogger"]]
    files = [path.name for path in root.glob("wandb/offline-run-*/*.wandb")]
    assert files == [f"run-{runs['WandbLogger']}.wandb"] * 2


def test_a_secret_of_the_command_line_stands_nowhere(root: Path) -> None:
    files = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
