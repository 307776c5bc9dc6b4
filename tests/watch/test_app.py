"""The screen, driven by Textual's own pilot; the command; the report without a terminal."""

from __future__ import annotations

import asyncio
import builtins
import re
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static, TabbedContent

from sppo_lightning.__main__ import main
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.watch.app import Responses, WatchApp
from sppo_lightning.watch.reading import RunReader

HOSTILE = "a\x1b]0;owned\x07 [red]b[/red] \u202ec"


def drive(root: Path, steps: Callable[[Pilot[None]], Awaitable[None]]) -> WatchApp:
    app = WatchApp(RunReader(root))

    async def run() -> None:
        async with app.run_test(size=(120, 50)) as pilot:
            await pilot.pause()
            await steps(pilot)

    asyncio.run(run())
    return app


def text_of(pilot: Pilot[Any], name: str) -> str:
    content = pilot.app.screen.query_one(f"#{name}", Static).content
    return content.plain if isinstance(content, Text) else str(content)


def table_of(pilot: Pilot[Any], name: str) -> DataTable[Text]:
    table: DataTable[Text] = pilot.app.query_one(f"#{name}-table", DataTable)
    return table


def test_the_overview(finished: Path) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        assert text_of(pilot, "status") == "finished: 3 of 3 iterations"
        assert text_of(pilot, "troubles") == ""
        assert text_of(pilot, "loss-caption").startswith("training loss: ")
        assert len(pilot.app.query_one("#reward", Sparkline).data or ()) == 4
        assert len(pilot.app.query_one("#loss", Sparkline).data or ()) == 12

    assert drive(finished, steps).title == "finished"


def test_prompts_are_opened_by_keys(finished: Path) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("2")
        assert pilot.app.query_one(TabbedContent).active == "prompts"
        assert text_of(pilot, "prompts-caption").startswith("iteration 2: 10 prompts")
        table = table_of(pilot, "prompts")
        prompt = table.get_row_at(1)[-1].plain
        await pilot.press("down", "enter")
        await pilot.pause()
        assert isinstance(pilot.app.screen, Responses)
        shown = text_of(pilot, "responses")
        assert shown.startswith(f"{prompt}\n")
        assert len(re.findall(r"── .*reward -?\d+\.\d+ · \d+ tokens · (stop|length)", shown)) in (2, 3)
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, Responses)
        await pilot.press("left_square_bracket")
        assert text_of(pilot, "prompts-caption").startswith("iteration 1: 10 prompts")
        await pilot.press(*["left_square_bracket"] * 3)
        assert text_of(pilot, "prompts-caption").startswith("iteration 0: 10 prompts")
        await pilot.press("right_square_bracket")
        assert text_of(pilot, "prompts-caption").startswith("iteration 1: 10 prompts")

    drive(finished, steps)


def test_held_out_answers_are_opened_by_keys(finished: Path) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("3", "enter")
        await pilot.pause()
        shown = text_of(pilot, "responses")
        assert re.search("── initial policy .*── after 1 .*── after 3 ", shown, re.DOTALL)

    drive(finished, steps)


def test_q_leaves(finished: Path) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("q")

    assert drive(finished, steps).return_code == 0


def test_the_run_is_looked_at_again_as_it_grows(finished: Path, tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    growing.mkdir()
    shutil.copy(finished / "config.yaml", growing)

    async def steps(pilot: Pilot[None]) -> None:
        assert "evaluating" in text_of(pilot, "status")
        assert text_of(pilot, "reward-caption") == "held-out reward: nothing yet"
        assert table_of(pilot, "prompts").row_count == 0
        shutil.copytree(finished, growing, dirs_exist_ok=True)
        await pilot.pause(1.2)  # longer than it waits between two looks
        assert text_of(pilot, "status") == "finished: 3 of 3 iterations"
        assert table_of(pilot, "prompts").row_count == 10
        assert table_of(pilot, "held-out").row_count == 4

    drive(growing, steps)


def test_prompts_appear_as_they_are_probed(finished: Path, tmp_path: Path) -> None:
    folder = finished / "iterations/002"
    for name in ("manifest.json", "difficulty.parquet", "pairs.parquet"):
        (folder / name).unlink()
    for path in (folder / "rollouts").glob("topup*"):
        path.unlink()
    shard = folder / "rollouts/probe-00001.parquet"
    waiting = shard.rename(tmp_path / shard.name)

    async def steps(pilot: Pilot[None]) -> None:
        assert table_of(pilot, "prompts").row_count == 5
        waiting.rename(shard)
        await pilot.pause(1.2)
        assert table_of(pilot, "prompts").row_count == 10

    drive(finished, steps)


def test_a_damaged_run_is_shown(finished: Path) -> None:
    (finished / "iterations/002/manifest.json").write_text("{")
    (finished / "iterations/001/rollouts/probe-00000.parquet").write_text("no table")

    async def steps(pilot: Pilot[None]) -> None:
        assert "manifest.json is damaged" in text_of(pilot, "troubles")
        await pilot.press("2", "left_square_bracket")
        await pilot.pause()
        assert table_of(pilot, "prompts").row_count == 0
        assert any("probe-00000.parquet is damaged" in note.message for note in pilot.app._notifications)

    drive(finished, steps)


def test_texts_do_not_command_the_terminal(finished: Path) -> None:
    store = RunFolder(finished).iteration(2)
    for path in store.shards.folder.glob("*.parquet"):
        name, number = path.stem.rsplit("-", 1)
        rows = store.shards.read(name, int(number))
        assert rows is not None
        write_rollouts(path, [replace(row, prompt=HOSTILE, response=HOSTILE) for row in rows])

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("2")
        safe = r"a\x1b]0;owned\x07 [red]b[/red] \u202ec"
        assert table_of(pilot, "prompts").get_row_at(0)[-1].plain == safe
        await pilot.press("enter")
        await pilot.pause()
        assert text_of(pilot, "responses").count(safe) >= 3

    drive(finished, steps)


# -------------------------------------------------------------------- command


def test_a_report_where_there_is_no_terminal(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["watch", str(finished)])
    shown = capsys.readouterr().out
    assert shown.startswith("finished: finished: 3 of 3 iterations\n")
    assert re.search(r"training loss: .* 12 values\)\n[▁-█]{12}\n", shown)
    assert re.search(r"initial policy +-0\.\d+ ± ", shown)
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "watch: the following arguments are required: run"),
        (["{empty}"], "is no run: it has no config.yaml"),
        (["{empty}", "--fast"], "watch: unrecognized arguments: --fast"),
    ],
)
def test_arguments_that_are_wrong(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["watch", *(arg.format(empty=tmp_path) for arg in args)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {}\n", "'data'"),
        ("data: []\n", "must be integers or slices"),
        ("data: {iterations: many}\n", "invalid literal for int"),
        ("- data\n", "it holds no settings"),
        ("data: [\n", "while parsing a flow"),
        ("[" * 5000, "recursion depth exceeded"),
        ("", "it holds no settings"),
    ],
)
def test_settings_that_cannot_be_read(
    text: str, reason: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["watch", str(finished)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.yaml cannot be read as a run's config (" in line
    assert reason in line


def test_without_textual_it_says_how_to_install_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "textual":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "sppo_lightning.watch.app", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        main(["watch", str(finished)])
    assert (
        "watch needs Textual, which is not installed: pip install 'sppo-lightning[watch]'"
        in capsys.readouterr().err
    )
