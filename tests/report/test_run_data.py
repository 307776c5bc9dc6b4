"""A run's folder as records: whole, in progress, pruned, damaged, and with links."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from support.made_runs import MadeRun

from sppo_lightning.report.run_data import read_run
from sppo_lightning.system.environment import add_start
from sppo_lightning.types import UserError


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").write()


def test_a_whole_run(made: MadeRun) -> None:
    run = read_run(made.root)
    assert (run.name, run.finished, run.planned) == ("run", 2, 2)
    assert run.reader.missing == []
    assert [one.finished for one in run.evaluations] == [0, 1, 2]
    assert run.evaluations[1].logps == {f"e{number}": -3.0 for number in range(4)}
    assert run.curves["train/loss"][0] == list(range(10))
    assert [one.action for one in run.decisions] == ["accept", "accept"]
    first = run.iterations[0]
    assert Counter(row.outcome for row in first.rows) == {"not_selected": 6, "tied_rewards": 3, "paired": 3}
    # 12 prompts with 5 + 6 tokens, 6 of them with 7 + 8 more; 3 pairs of 2 prompt, 8 chosen and 5 rejected tokens
    assert first.tokens == {"probing": 132, "generating": 90, "reference": 45, "training": 45}


def test_a_row_says_what_was_sampled(made: MadeRun) -> None:
    """Prompt 2: rewards 2/12 + 0, 0.01, 0.02, 0.03; lengths 5 to 8; the probe are the first two of them."""
    rows = {row.prompt_id: row for row in read_run(made.root).iterations[0].rows}
    row = rows["p2"]
    assert row.selected
    assert row.difficulty == pytest.approx(2 / 12 + 0.005)
    assert row.reward == pytest.approx(2 / 12 + 0.015)
    assert row.spread == pytest.approx((0.0005 / 3) ** 0.5)
    assert (row.responses, row.length) == (4, 6.5)
    assert row.gap == pytest.approx(0.03)
    assert rows["p1"].responses == 2


def test_a_run_in_progress(made: MadeRun) -> None:
    store = made.folder.iteration(1)
    for path in (store.pairs_path, store.difficulty_path, store.diagnostics_path):
        path.unlink()
    store.write_manifest({"iteration": 1, "complete": False})
    shutil.rmtree(made.folder.evaluation("002"))
    made.folder.gate.unlink()
    run = read_run(made.root)
    assert run.finished == 1
    assert run.reader.missing == ["iterations/001: its data is not complete yet."]
    # without difficulties nobody knows what is selected
    assert {row.outcome for row in run.iterations[1].rows} == {"not_selected"}


def test_damaged_files_are_named_and_the_rest_is_read(made: MadeRun) -> None:
    store = made.folder.iteration(0)
    store.shards.path("probe", 1).write_bytes(b"PAR1 no more PAR1")
    store.pairs_path.write_bytes(b"")
    store.diagnostics_path.write_text("{")
    made.folder.gate.write_text("{}")
    (made.folder.evaluation("001") / "rollouts.parquet").unlink()
    (made.folder.evaluation("002") / "logps.json").write_text("[]")
    with made.folder.metrics.open("a") as file:
        file.write("11,a half wri")
    run = read_run(made.root)
    assert run.reader.missing == [
        "gate.json: damaged, or of another version. The gate's decisions are not shown.",
        "evaluations/001/rollouts.parquet: not there. Held-out answers after 1 iteration(s) are missing.",
        "evaluations/002/logps.json: damaged, or of another version. Their log-probs are missing.",
        "iterations/000/pairs.parquet: damaged, or of another version. Chosen and rejected are not marked.",
        "iterations/000/diagnostics.json: damaged, or of another version. Its KL is missing.",
        "iterations/000/rollouts/probe-00001.parquet: damaged, or of another version. Its responses are missing.",
    ]
    assert [one.finished for one in run.evaluations] == [0, 2]
    assert (
        len(run.iterations[0].samples) == 7 + 2
    )  # the damaged shard's 5, less the 2 that were topped up, are gone
    assert run.curves["train/loss"][0] == list(range(10))


@pytest.mark.parametrize("limit", [2**17, 2**26])
def test_settings_and_metrics_that_no_reader_takes(
    made: MadeRun, limit: int, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(csv.field_size_limit, csv.field_size_limit(limit)))  # the process's
    made.folder.config.write_text("data: [unclosed\n: :")
    made.folder.metrics.write_text("step,train/loss\n0," + "1" * 200_000 + "\n")
    run = read_run(made.root)
    assert (run.config, run.curves) == ({}, {})
    assert run.reader.missing == [
        "config.yaml: damaged, or of another version. The settings are not shown.",
        "metrics.csv: damaged, or of another version. The curves are not shown.",
    ]


def test_a_pruned_iteration(made: MadeRun) -> None:
    store = made.folder.iteration(0)
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    run = read_run(made.root)
    assert run.reader.missing == [
        "iterations/000/rollouts: deleted to save space (data.keep_iterations): of its responses only pairs are there."
    ]
    assert Counter(row.outcome for row in run.iterations[0].rows)["paired"] == 3


def test_links_out_of_the_folder_are_not_followed(made: MadeRun, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(made.folder.iteration(1).folder, elsewhere)
    shutil.rmtree(made.folder.iteration(1).folder)
    made.folder.iteration(1).folder.symlink_to(elsewhere)
    made.folder.metrics.rename(tmp_path / "metrics.csv")
    made.folder.metrics.symlink_to(tmp_path / "metrics.csv")
    run = read_run(made.root)
    assert run.curves == {}
    assert run.iterations[1].rows == []
    assert all("a link out of the folder, which is not followed" in text for text in run.reader.missing)


def test_a_run_whose_own_folder_is_a_link_is_read(made: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(made.root)
    run = read_run(tmp_path / "latest")
    assert run.reader.missing == []


def test_secrets_are_masked(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", config={"logger": {"api_key": "sk-1234"}}).write()
    assert "sk-1234" not in str(read_run(made.root).config)


def test_starts_are_read(made: MadeRun) -> None:
    for step in (0, 7):
        add_start(made.folder.environment, {"step": step, "device": "cpu"})
    assert [start["step"] for start in read_run(made.root).starts] == [0, 7]


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_what_is_no_run(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "run"
    if kind == "file":
        place.write_text("")
    elif kind == "empty":
        place.mkdir()
    with pytest.raises(UserError, match=r"is no (run|folder).*give a folder that was a fit's") as error:
        read_run(place)
    assert "\n" not in str(error.value)
