"""``sppo-lightning report`` from its arguments to its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.made_runs import MadeRun

from sppo_lightning.__main__ import main


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").write()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["report", *arguments])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_page_in_the_runs_folder(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(made.root)])
    assert capsys.readouterr().err == f"The report lies in {made.root}/report.html; open it in a browser.\n"
    page = made.folder.report.read_text()
    assert page.startswith("<!doctype html>")
    assert str(made.root.parent) not in page
    assert all(name in page for name in ("Leon Sorokin", "Kevin Decker"))  # licences of the libraries in it


def test_the_same_run_gives_the_same_page(made: MadeRun) -> None:
    pages = []
    for _ in range(2):
        main(["report", str(made.root)])
        pages.append(made.folder.report.read_bytes())
    assert pages[0] == pages[1]


def test_markdown_and_json_go_to_the_standard_output(
    made: MadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(made.root), "--format=md"])
    assert capsys.readouterr().out.startswith("# run\n")
    main(["report", str(made.root), "--format=json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["finished"] == 2
    assert not made.folder.report.exists()


def test_several_runs_go_into_the_current_folder(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MadeRun(tmp_path / "other").write()
    monkeypatch.chdir(tmp_path)
    main(["report", str(made.root), str(other.root)])
    assert (tmp_path / "report.html").exists()
    main(["report", str(made.root), str(other.root), "--format", "json", "--output", "deep/down.json"])
    assert json.loads((tmp_path / "deep/down.json").read_text())["comparison"] is not None


def test_bad_input(made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(made.root)
    assert "is no folder" in refused([str(tmp_path / "nowhere")], capsys)
    assert "is no run: it has neither config.yaml nor iterations/" in refused([str(tmp_path)], capsys)
    assert "the same run is named twice" in refused([run, f"{run}/"], capsys)
    assert "--max_megabytes 0.0 must be more than 0" in refused([run, "--max_megabytes=0"], capsys)
    assert "is a folder: name a file" in refused([run, f"--output={tmp_path}"], capsys)
    (tmp_path / "file").write_text("")
    said = refused([run, f"--output={tmp_path / 'file' / 'report.html'}"], capsys)
    assert "cannot be written" in said
    assert "name another file" in said
    assert "Got value: pdf" in refused([run, "--format=pdf"], capsys)
    assert "report:" in refused([], capsys)


def test_categories_come_from_the_prompts_file(
    made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    records = [
        {"id": f"p{n}", "prompt": f"say p{n}", "topic": "even" if n % 2 == 0 else "odd"} for n in range(12)
    ]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["report", str(made.root), f"--prompts={prompts}", "--category_field=topic"])
    capsys.readouterr()
    assert "no prompt has the field 'category'" in refused([str(made.root), f"--prompts={prompts}"], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    made.root.chmod(0o500)
    assert "cannot be read or written" in refused([str(made.root)], capsys)


@pytest.mark.slow
def test_from_the_shell(made: MadeRun) -> None:
    command = [sys.executable, "-m", "sppo_lightning", "report", str(made.root), "--format", "md"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# run\n")
