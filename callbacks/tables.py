"""Tables on a terminal, and as plain lines where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sppo_lightning.text import for_terminal


@dataclass(frozen=True)
class SummaryTable:
    """A table of texts and numbers.

    Args:
        columns: their headings.
        rows: a cell for each column.
        widths: of the plain form, in characters; numbers are put right in them. A last column without one holds texts.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    widths: Sequence[int]

    def plain(self) -> Iterator[str]:
        """Yield a line for the headings and each row, two blanks in."""
        for row in (self.columns, *self.rows):
            numbers = [f"{cell:>{width}}" for cell, width in zip(row, self.widths, strict=False)]
            yield "  " + " ".join([*numbers, *(f" {cell}" for cell in row[len(self.widths) :])])

    def rich(self) -> Table:
        """Return the table for a terminal, where long cells wrap."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, heading in enumerate(self.columns):
            is_text = number >= len(self.widths)
            table.add_column(_text(heading), justify="left" if is_text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(_text, row))
        return table


@dataclass(frozen=True)
class AnswerTable:
    """Answers to the same prompts, before and after training.

    Args:
        rows: prompt, reward and answer before, reward and answer after.
        longest: characters that the plain form shows of a text.
    """

    rows: Sequence[tuple[str, float | None, str, float | None, str]]
    longest: int = 96

    def plain(self) -> Iterator[str]:
        """Yield three lines a prompt."""
        for prompt, reward_before, before, reward_after, after in self.rows:
            yield f"  {_line(prompt, self.longest)}"
            yield f"    before ({_reward(reward_before)})  {_line(before, self.longest)}"
            yield f"    after  ({_reward(reward_after)})  {_line(after, self.longest)}"

    def rich(self) -> Table:
        """Return the table for a terminal, with four times as much of each text."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_lines=True)
        for heading in ("prompt", "before", "after"):
            table.add_column(heading, ratio=1, overflow="fold")
        for prompt, reward_before, before, reward_after, after in self.rows:
            cells = (prompt, f"({_reward(reward_before)}) {before}", f"({_reward(reward_after)}) {after}")
            table.add_row(*(_text(_line(cell, 4 * self.longest)) for cell in cells))
        return table


Part = str | SummaryTable | AnswerTable
"""Of a summary: a line, or a table."""


def plain_text(parts: Sequence[Part]) -> str:
    """Return a summary as lines."""
    return "\n".join(line for part in parts for line in ([part] if isinstance(part, str) else part.plain()))


def print_parts(parts: Sequence[Part], file: TextIO) -> None:
    """Print a summary: with tables as wide as the terminal, or as plain lines where ``file`` is none.

    ``NO_COLOR`` and ``TERM=dumb`` ask for plain lines too.
    """
    if not file.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        print(for_terminal(plain_text(parts)), file=file, flush=True)
        return
    console = Console(file=file, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(_text(part), soft_wrap=True)  # so that a command can be copied
        else:
            console.print(part.rich())
    file.flush()


def _text(cell: str) -> Text:
    """Return what others wrote as text, neither obeyed by the terminal nor read as markup."""
    return Text(for_terminal(cell))


def _reward(reward: float | None) -> str:
    return "no reward" if reward is None else f"{reward:.2f}"


def _line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
