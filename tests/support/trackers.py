"""What experiment trackers have stored of a run: metrics as (name, step, value), tables and histograms."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Point = tuple[str, int, str]  # metric, step, value in float32, as TensorBoard has it, with 6 digits


class Stored(NamedTuple):
    """What one tracker holds."""

    points: list[Point]  # sorted
    tables: dict[int, list[list[Any]]]  # samples by step
    histograms: dict[str, dict[int, int]]  # values in each, by name and step


def point(name: str, step: int, value: float) -> Point:
    return name, step, f"{np.float32(value):.6g}"


def read_csv(path: Path) -> list[Point]:
    """``metrics.csv``."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [
        point(name, int(row["step"]), float(value))
        for row in rows
        for name, value in row.items()
        if value and name != "step"
    ]
    return sorted(found)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a LevelDB log in blocks of 32 KiB, each record with checksum, size and kind."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # padding
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_wandb(folder: Path) -> Stored:
    """All offline runs below ``folder``, in order of time."""
    points: list[Point] = []
    tables: dict[int, list[list[Any]]] = {}
    histograms: dict[str, dict[int, int]] = {}
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            step = row.get("trainer/global_step")
            for name, value in row.items():
                if isinstance(value, dict) and value["_type"] == "table-file":
                    tables[step] = json.loads((path.parent / "files" / value["path"]).read_text())["data"]
                elif isinstance(value, dict):
                    histograms.setdefault(name, {})[step] = sum(value["values"])
                elif not name.startswith("_") and name != "trainer/global_step":
                    points.append(point(name, step, float(value)))
    return Stored(sorted(points), tables, histograms)


def read_mlflow(uri: str, experiment: str) -> Stored:
    """The runs of an experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    points: list[Point] = []
    tables: dict[int, list[list[Any]]] = {}
    histograms: dict[str, dict[int, int]] = {}
    for run in client.search_runs([found.experiment_id]):
        run_id = run.info.run_id
        for name in run.data.metrics:
            points += [point(name, item.step, item.value) for item in client.get_metric_history(run_id, name)]
        for item in client.list_artifacts(run_id, "samples"):
            table = json.loads(Path(client.download_artifacts(run_id, item.path)).read_text())
            tables[int(Path(item.path).stem)] = table["data"]
        for name in ("iteration/difficulty", "iteration/reward"):
            for item in client.list_artifacts(run_id, f"histograms/{name}"):
                table = json.loads(Path(client.download_artifacts(run_id, item.path)).read_text())
                counts = histograms.setdefault(name, {})
                counts[int(Path(item.path).stem)] = sum(row[2] for row in table["data"])
    return Stored(sorted(points), tables, histograms)


def read_trackio(project: str) -> Stored:
    """The runs of a project in the folder that ``TRACKIO_DIR`` named when Trackio was imported."""
    from trackio.api import Api
    from trackio.sqlite_storage import SQLiteStorage

    points: list[Point] = []
    tables: dict[int, list[list[Any]]] = {}
    histograms: dict[str, dict[int, int]] = {}
    for run in Api().runs(project):
        for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
            step = row["step"]
            for name, value in row.items():
                if isinstance(value, dict) and value["_type"] == "trackio.table":
                    tables[step] = [list(cells.values()) for cells in value["_value"]]
                elif isinstance(value, dict):
                    histograms.setdefault(name, {})[step] = sum(value["values"])
                elif name not in ("step", "timestamp"):
                    points.append(point(name, step, float(value)))
    return Stored(sorted(points), tables, histograms)


def read_tensorboard(folder: Path) -> Stored:
    """The events of a folder; texts are returned as one cell."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()
    points = [
        point(name, item.step, item.value)
        for name in events.Tags()["scalars"]
        for item in events.Scalars(name)
    ]
    texts = {
        item.step: [[make_ndarray(item.tensor_proto)[0].decode()]]
        for name in events.Tags()["tensors"]
        if name == "samples/text_summary"
        for item in events.Tensors(name)
    }
    histograms = {
        name: {item.step: int(item.histogram_value.num) for item in events.Histograms(name)}
        for name in events.Tags()["histograms"]
    }
    return Stored(sorted(points), texts, histograms)


def bins(histograms: dict[str, dict[int, int]]) -> dict[str, list[int]]:
    """How many values each histogram has, by step."""
    return {name: [counts[step] for step in sorted(counts)] for name, counts in histograms.items()}


def values(points: list[Point], name: str) -> np.ndarray:
    """The values of a metric, by step."""
    return np.array([float(value) for other, _, value in points if other == name])
