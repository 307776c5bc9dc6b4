"""The ``sppo-lightning`` command."""

from __future__ import annotations

import io
import os
import pkgutil
import select
import signal
import sys
from pathlib import Path
from typing import NoReturn

from sppo_lightning.cli.current_folder import find_modules_in
from sppo_lightning.system.durable import disk_error
from sppo_lightning.system.lock import is_first_process
from sppo_lightning.text import for_terminal
from sppo_lightning.types import Stopped, UserError

COMMANDS = {
    "chat": "sppo_lightning.chat.command:main",
    "export": "sppo_lightning.export.command:main",
    "judge": "sppo_lightning.judging.command:main",
    "report": "sppo_lightning.report.command:main",
    "study": "sppo_lightning.study.command:main",
    "watch": "sppo_lightning.watch.command:main",
}
"""Commands of their own, beside those of LightningCLI; imported when they are asked for."""
READER_GONE = 128 + 13  # as a shell counts SIGPIPE


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input ends in one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be one of ASCII, which knows no ± or …
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _run(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)  # Python flushes once more when it ends
        sys.exit(READER_GONE)


def _run(given: list[str]) -> None:
    find_modules_in(Path.cwd())  # so that a config or --format can name a class in a file there
    try:
        if given and given[0] in COMMANDS:
            pkgutil.resolve_name(COMMANDS[given[0]])(given[1:])
        else:
            from sppo_lightning.cli.main import run

            run(given, tuple(COMMANDS))
    except UserError as error:
        _leave(str(error))
    except Stopped as stop:
        if not is_first_process(os.environ):
            sys.exit(
                0
            )  # the first one speaks for the run, and Lightning kills it where another leaves with an error
        print(
            f"sppo-lightning: {stop}. What is finished is on disk: the same command resumes from there.",
            file=sys.stderr,
        )
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        # where nobody listens to signals: before a run begins, or between two runs of a study
        print("sppo-lightning: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        message = disk_error(error, Path(error.filename or Path.cwd()))
        if message is None:
            raise
        _leave(str(message))
    except SyntaxError as error:  # of a module that the config names
        _leave(f"{error.filename}:{error.lineno}: {error.msg}: correct that line")


def _leave(message: str) -> NoReturn:
    line = " ".join(part.strip() for part in message.splitlines())
    print(for_terminal(f"sppo-lightning: error: {line}"), file=sys.stderr)
    sys.exit(2)


def _reader_is_gone() -> bool:
    """Whether who read standard output or error, e.g. ``head``, has closed it."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
