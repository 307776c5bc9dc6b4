"""``predict --format NAME``: the short way to say ``--data.predict_format``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sppo_lightning.predictions.formats import FORMATS
from sppo_lightning.types import UserError

KEY = "--data.predict_format"


def with_predict_format(args: Sequence[str]) -> list[str]:
    """Return the command line with ``--format`` written out.

    Args:
        args: after ``sppo-lightning``.

    Raises:
        UserError: if there is no such format.
    """
    if "predict" not in args:
        return list(args)
    found: list[str] = []
    for arg in args:
        flag, joined, value = arg.partition("=")
        if flag == "--format" and joined:
            found += [KEY, _class_path(value)]
        elif found[-1:] == [KEY]:
            found.append(_class_path(arg))
        else:
            found.append(KEY if arg == "--format" else re.sub(r"^--format\.", f"{KEY}.", arg))
    return found


def _class_path(name: str) -> str:
    if "." not in name and name not in FORMATS:
        raise UserError(
            f"--format {name}: there is no such format; give {', '.join(FORMATS)}, or the class path of a format of "
            "your own, e.g. my_module.MyFormat"
        )
    return FORMATS.get(name, name)
