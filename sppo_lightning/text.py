"""Text of others on its way to people: prompts, responses, servers' answers and files' names are not to be trusted.

A terminal obeys escape sequences (colours, its title, the clipboard) and shows letters in the order that they ask for;
a Markdown viewer fetches images. Every text that a person reads goes through one of these functions, at the exit.
"""

from __future__ import annotations

import re

# control characters but tab and newline; marks that reorder or hide text; separators of lines; half surrogate pairs
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKUP = re.compile(r"[\\`*\[|]|(?<![^\W_])_|_(?![^\W_])")


def for_terminal(text: str) -> str:
    """Return a text that a terminal shows and does not obey: its commands in letters, e.g. ``\\x1b``.

    Tabs and line breaks stay.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_markdown(text: str) -> str:
    """Return a text as one line of Markdown that reads as it is written: no image, link or HTML, no end of a cell."""
    line = for_terminal(" ".join(text.split()))
    return _MARKUP.sub(r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")
