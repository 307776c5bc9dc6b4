"""The closing summary as tables on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len

from sppo_lightning.callbacks.tables import AnswerTable, Part, SummaryTable, plain_text, print_parts

LONG = "a long answer of many words " * 8
PARTS: list[Part] = [
    "Iterations",
    SummaryTable(("k", "reward", "dropped"), [("0", "0.131", "3 not_selected, 1 tied_rewards")], (2, 8)),
    AnswerTable([("[bold]say[/] \x1b[2J", 0.5, "日本語 " * 40, None, LONG)], longest=40),
    f"  run this:  {'x' * 100}",
]
PLAIN = f"""\
Iterations
   k   reward  dropped
   0    0.131  3 not_selected, 1 tied_rewards
  [bold]say[/] \\x1b[2J
    before (0.50)  {("日本語 " * 40)[:39]}…
    after  (no reward)  {LONG[:39]}…
  run this:  {"x" * 100}
"""


class Terminal(io.StringIO):
    """Standard output on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns."""
    found = Terminal()
    for name, value in {"COLUMNS": "60", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def test_plain_lines_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    print_parts(PARTS, file)
    assert file.getvalue() == PLAIN
    assert plain_text(PARTS).replace("\x1b", "\\x1b") + "\n" == PLAIN


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_lines_where_they_are_asked_for(
    name: str, value: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    print_parts(PARTS, terminal)
    assert terminal.getvalue() == PLAIN


def test_tables_wrap_at_the_terminals_width(terminal: Terminal) -> None:
    print_parts(PARTS, terminal)
    *table, command = terminal.getvalue().splitlines()
    shown = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in table]
    assert max(map(cell_len, shown)) <= 60
    assert command == f"  run this:  {'x' * 100}"  # whole, so that it can be copied


def test_a_terminal_obeys_no_cell(terminal: Terminal) -> None:
    print_parts(PARTS, terminal)
    assert "\x1b[2J" not in terminal.getvalue()
    assert "[bold]say[/]" in terminal.getvalue()
    assert "\\x1b[2J" in terminal.getvalue()
