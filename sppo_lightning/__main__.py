"""The ``sppo-lightning`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from sppo_lightning.system.durable import disk_error
from sppo_lightning.system.lock import is_first_process
from sppo_lightning.types import Stopped, UserError


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input ends in one line and exit status 2."""
    given = sys.argv[1:] if args is None else args
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that a config or --format can name a class in a file there
    try:
        if given[:1] == ["export"]:
            from sppo_lightning.export.command import main as export

            export(given[1:])
        else:
            from sppo_lightning.cli.main import run

            run(given)
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
    except OSError as error:
        message = disk_error(error, Path(error.filename or Path.cwd()))
        if message is None:
            raise
        _leave(str(message))
    except SyntaxError as error:  # of a module that the config names
        _leave(f"{error.filename}:{error.lineno}: {error.msg}: correct that line")


def _leave(message: str) -> NoReturn:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"sppo-lightning: error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
