"""Text of others on its way to a terminal or a Markdown viewer."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sppo_lightning.text import for_markdown, for_terminal

TEXTS = st.text(st.characters() | st.sampled_from("![](){}<>&|`*_#\\\x1b\x07\u202e ab:/"), max_size=40)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé, 日本語, 👩\u200d🚀\tand\nlines", "plain, ünïcödé, 日本語, 👩\u200d🚀\tand\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]52;c;cm0gLXJm\x07", r"\x1b]52;c;cm0gLXJm\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("nul\x00", r"nul\x00"),
        ("gpj.\u202eexe\u2069", r"gpj.\u202eexe\u2069"),
        ("half \udce9", r"half \udce9"),
        ("hidden \U000e0041", r"hidden \U000e0041"),
    ],
)
def test_a_terminal_shows_commands_in_letters(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_a_terminal_gets_no_command(text: str) -> None:
    found = for_terminal(text)
    assert not {unicodedata.category(character) for character in found.translate({9: None, 10: None})} & {
        "Cc",
        "Cs",
        "Zl",
        "Zp",
    }
    assert not any(
        unicodedata.bidirectional(character)
        in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
        for character in found
    )
    assert for_terminal(found) == found
    found.encode()


@pytest.mark.parametrize(
    "text",
    [
        "![a](https://example.org/spy.png)",
        "<img src=https://example.org/spy.png>",
        "[click](javascript:alert)",
        "a | b",
        "a \\| b",
        "`code` **bold** _slanted_",
        "&lt;",
        "snake_case, 2 * 3",
        "ends with \\",
    ],
)
def test_markdown_reads_as_it_is_written(text: str) -> None:
    """In a cell of a table, by a real renderer."""
    page = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(f"| a | b |\n|---|---|\n| {for_markdown(text)} | end |\n")
    )
    cells = re.findall("<td>(.*)</td>", page)
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert cells == [plain, "end"]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("__0__")
def test_markdown_gets_no_markup(text: str) -> None:
    page = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(f"| a | b |\n|---|---|\n| x{for_markdown(text)}x | end |\n")
    )
    assert set(re.findall(r"</?\w+", page)) <= {
        f"<{end}{name}" for end in ("", "/") for name in ("table", "thead", "tbody", "tr", "th", "td")
    }
    assert page.count("<td>") == 2
