"""``sppo-lightning report`` of a study's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_studies import MadeStudy

from sppo_lightning.__main__ import main
from sppo_lightning.report.study_folder import read_study
from sppo_lightning.types import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeStudy:
    return MadeStudy(tmp_path_factory.mktemp("studies") / "made", settings=("base", "other")).write()


def test_arms_claims_and_the_first_seed(made: MadeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(made.root), "--format=json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    study = found["study"]
    assert [setting["name"] for setting in study["settings"]] == ["base", "other"]
    first, easy = study["settings"][0]["arms"]
    assert (easy["title"], easy["seeds"]) == ("Easiest 30 %", 2)
    assert easy["gain"] - first["gain"] == pytest.approx(0.2)
    assert easy["by_iteration"] == {"0": 0.0, "1": pytest.approx(0.39), "2": pytest.approx(0.78)}
    assert easy["gain"] == pytest.approx(easy["by_iteration"]["2"])
    claim = study["claims"][0]
    assert claim["text"] == "Easy beats all. (Easiest 30 % against All prompts)"
    assert (claim["verdict"], claim["reading"]) == ("supported", "equal steps")
    assert (study["runs"], study["missing"]) == ({"all": 8, "ended": 8, "failed": 0}, [])
    assert ([run["name"] for run in found["runs"]], study["shown"]) == (["all", "easy"], "base/seed-1")
    assert study["left_out"] == 6
    assert [run["seed"] for run in found["runs"]] == [1, 1]


def test_as_markdown_and_as_a_page(made: MadeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(made.root), "--format=md"])
    text = capsys.readouterr().out
    assert text.startswith("# made\n\nEasy beats all.\n\n8 of 8 runs have ended, 0 failed.\n")
    assert "| Easiest 30 % | 2 | +0.780 \\[" in text
    assert "| supported |" in text
    assert "Below: the runs of base/seed-1; 6 that have ended are left out." in text
    assert "# easy\n" in text
    main(["report", str(made.root)])
    assert f"The report lies in {made.root}/report.html" in capsys.readouterr().err
    assert "<title>made</title>" in (made.root / "report.html").read_text()


def test_in_progress_with_a_failed_run(tmp_path: Path) -> None:
    found = read_study(
        MadeStudy(
            tmp_path / "s",
            failed={"base/seed-1/all": "error: out of memory"},
            waiting=("base/seed-2/all", "base/seed-2/easy"),
        )
        .write()
        .root
    )
    assert found.reader.missing == [
        "runs/base/seed-1/all: failed: error: out of memory",
        "2 of 4 runs have not ended: base/seed-2/all, base/seed-2/easy",
    ]
    assert [row["arm"] for row in found.arms] == ["easy"]
    assert [path.name for path in found.shown] == ["easy"]


@pytest.mark.parametrize("format", ["html", "md", "json"])
def test_nothing_has_ended(tmp_path: Path, format: str) -> None:
    waiting = tuple(f"base/seed-{seed}/{arm}" for seed in (1, 2) for arm in ("all", "easy"))
    root = MadeStudy(tmp_path / "s", waiting=waiting).write().root
    main(["report", str(root), f"--format={format}", f"--output={tmp_path / 'report'}"])
    assert (tmp_path / "report").stat().st_size > 0
    assert read_study(root).reader.missing == [f"4 of 4 runs have not ended: {', '.join(waiting)}"]


def test_what_is_damaged_or_elsewhere_is_named(tmp_path: Path) -> None:
    root = MadeStudy(tmp_path / "s").write().root
    (root / "verdicts.parquet").write_bytes(b"PAR1")
    (root / "prompts.parquet").unlink()
    (root / "state/base/seed-1/all.json").write_text("[]")
    run = root / "runs/base/seed-1/easy"
    run.rename(tmp_path / "easy")
    run.symlink_to(tmp_path / "easy")
    found = read_study(root)
    assert found.reader.missing == [
        "state/base/seed-1/all.json: damaged, or of another version. How the run ended is not known.",
        "runs/base/seed-1/easy: not there, or a link out of the folder. The run is not shown.",
        "1 of 4 runs have not ended: base/seed-1/all",
        "prompts.parquet: not there. Gains by iteration are not shown.",
        "verdicts.parquet: damaged, or of another version. Claims are not shown.",
    ]
    assert len(found.arms) == 2
    assert [str(path.relative_to(root / "runs")) for path in found.shown] == [
        "base/seed-2/all",
        "base/seed-2/easy",
    ]


@pytest.mark.parametrize("name", ["../../../etc", "base/seed-1/..", "/base/seed-1/all", "base/all"])
def test_a_run_lies_in_the_studys_folder(tmp_path: Path, name: str) -> None:
    root = MadeStudy(tmp_path / "s", waiting=("base/seed-1/all", "base/seed-1/easy"), seeds=(1,)).write().root
    content = json.loads((root / "study.json").read_text())
    content["configs"] = {name: {}}
    (root / "study.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"study.json is damaged \(no runs, or names that are none\): restore it"
    ):
        read_study(root)


def test_a_study_is_reported_alone(made: MadeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(made.root), str(made.root / "runs/base/seed-1/all")])
    assert "is a study, which is reported by itself: name it alone" in capsys.readouterr().err
