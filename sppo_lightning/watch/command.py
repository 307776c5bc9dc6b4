"""``sppo-lightning watch``: its arguments, and one report in plain lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError
from sppo_lightning.watch.reading import RunReader, RunView
from sppo_lightning.watch.words import (
    caption,
    decisions_text,
    iterations_table,
    results_table,
    sparkline,
    status,
)

SUMMARY = "Watch a run in the terminal: phases, curves, decisions, prompts and responses. Without a terminal: a report."


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"watch: {message}")


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning watch``.

    Raises:
        UserError: if this is no run, or Textual is not installed.
    """
    parser = _Parser(prog="sppo-lightning watch", description=SUMMARY)
    parser.add_argument("run", help="folder of the run")
    reader = RunReader(Path(parser.parse_args(args).run))
    logging.getLogger("sppo_lightning").setLevel(logging.ERROR)  # what is damaged is said on the screen
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        print_report(reader.read(), Console(highlight=False, width=160))
        return
    try:
        from sppo_lightning.watch.app import WatchApp
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise UserError(
            "watch needs Textual, which is not installed: pip install 'sppo-lightning[watch]'; with its output in a "
            "file or a pipe it prints a report without"
        ) from error
    WatchApp(reader).run()


def print_report(view: RunView, console: Console) -> None:
    """Print what there is to see, once.

    Args:
        view: the run.
        console: where to.
    """

    def say(*lines: str) -> None:
        for line in lines:
            console.print(Text(for_terminal(line)), soft_wrap=True)

    say(f"{view.name}: {status(view)}", *view.troubles)
    rewards = [result.reward for result in view.results]
    for name, values in (("held-out reward", rewards), ("training loss", view.losses)):
        say(caption(name, values), *([sparkline(values)] if values else []))
    for table in (results_table(view), iterations_table(view)):
        console.print(table)
    say(*decisions_text(view.decisions))
