"""A run's settings as a list, without the folders of the machine that it ran on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# a line that is one, spaces included, and one inside a text; neither what follows a URL's host, nor ``[/INST]``
_LINE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]).*[\\/]([^\\/\n]+)[\\/]?$", re.MULTILINE)
_PART = r"[^\s\"'`:;,|()\[\]{}<>\\/]"
_INSIDE = re.compile(
    r"(?<![^\s\"'`=:;,|({\[])(?!(?<=\[)/\w+\])"
    r"(?:(?<=file:)/+|(?!//[^/])/+|~[\w.-]*[\\/]+|[A-Za-z]:[\\/]+|\\\\)"
    rf"(?:{_PART}*[\\/]+)*({_PART}+)[\\/]?"
)


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key; of an absolute path the last part.

    Args:
        config: as YAML holds it, secrets masked.
    """
    found: dict[str, Any] = {}
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, Mapping) and value:
            rest.extend((f"{key}.{name}".lstrip("."), item) for name, item in reversed(list(value.items())))
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            rest.extend((f"{key}[{number}]", item) for number, item in reversed(list(enumerate(value))))
        else:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_plain(item)) for item in value)
    if isinstance(value, str):
        return _INSIDE.sub(r"…/\1", _LINE.sub(r"…/\1", value))
    return value if value is None or isinstance(value, bool | int | float) else str(value)
