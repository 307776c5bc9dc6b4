"""Conversations to token ids: special tokens at both ends, the date."""

from __future__ import annotations

from datetime import date

import pytest
from support.models import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sppo_lightning.prompts.chat_template import (
    at_day,
    set_template_clock,
    single_bos,
    template_token_ids,
)
from sppo_lightning.types import Message

BOS, EOS = 0, 1


def user(text: str) -> Message:
    return Message(role="user", content=text)


def adding(tokenizer: PreTrainedTokenizerFast, *, template: str) -> PreTrainedTokenizerFast:
    """Let the tokenizer add special tokens by itself, e.g. ``<bos> $A``."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def test_one_bos_where_template_and_tokenizer_add_one() -> None:
    tokenizer = adding(byte_tokenizer(), template="<bos> $A")
    assert tokenizer("x")["input_ids"][0] == BOS  # it does add one
    ids = template_token_ids(tokenizer, [user("Hi")], add_generation_prompt=True)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert tokenizer.decode(ids) == "<bos><user>Hi<assistant>"


def test_one_bos_where_the_text_and_the_tokenizer_bring_one() -> None:
    """Without a chat template a prompt may have been written with its BOS."""
    tokenizer = adding(byte_tokenizer(chat_template=None), template="<bos> $A")
    assert tokenizer("<bos>Hi")["input_ids"][:2] == [BOS, BOS]  # it does add a second one
    ids = template_token_ids(tokenizer, [user("<bos>Hi")], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<bos>Hi"


def test_no_bos_is_invented() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    assert tokenizer.decode(template_token_ids(tokenizer, [user("Hi")], add_generation_prompt=True)) == "Hi"


def test_a_bos_that_opens_every_turn_is_kept() -> None:
    """ChatML of a model whose BOS is its turn marker; the tokenizer adds another one in front."""
    chatml = (
        "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    )
    tokenizer = adding(byte_tokenizer(chat_template=chatml), template="<bos> $A")
    messages = [Message(role="system", content="S"), user("Hi")]
    ids = template_token_ids(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<bos>system\nS<eos><bos>user\nHi<eos><bos>assistant\n"
    assert single_bos(tokenizer, [BOS, *ids]) == ids


def test_single_bos_cuts_the_opening_run_only() -> None:
    tokenizer = byte_tokenizer()
    assert single_bos(tokenizer, [BOS, BOS, BOS, 7, BOS, BOS]) == [BOS, 7, BOS, BOS]
    assert single_bos(tokenizer, [7, BOS, BOS]) == [7, BOS, BOS]
    assert single_bos(tokenizer, [BOS]) == [BOS]
    assert single_bos(tokenizer, []) == []


def test_an_end_token_that_the_tokenizer_appends_is_taken_off() -> None:
    tokenizer = adding(byte_tokenizer(chat_template=None), template="<bos> $A <eos>")
    assert tokenizer("Hi")["input_ids"][-1] == EOS  # it does append one
    assert (
        tokenizer.decode(template_token_ids(tokenizer, [user("Hi")], add_generation_prompt=True)) == "<bos>Hi"
    )
    plain = byte_tokenizer(chat_template=None)
    ids = template_token_ids(plain, [user("Hi<eos>")], add_generation_prompt=True)
    assert ids[-1] == EOS  # the prompt's own


def test_a_template_that_prints_the_date_prints_the_runs() -> None:
    template = "{{ strftime_now('%d %b %Y') }}|{{ messages[0]['content'] }}"
    tokenizer = byte_tokenizer(chat_template=template)

    def seen() -> str:
        return tokenizer.decode(template_token_ids(tokenizer, [user("Hi")], add_generation_prompt=True))

    try:
        set_template_clock(date(2024, 2, 29))
        assert seen() == "29 Feb 2024|Hi"
    finally:
        set_template_clock(None)
    assert seen() == f"{date.today():%d %b %Y}|Hi"


@pytest.mark.parametrize(
    "template", ["\n  {% if true %}\n x{% endif %}", "  a", "\n\n{{ 1 }}\n", "{% set a = 1 %}\n b"]
)
def test_the_date_changes_no_white_space(template: str) -> None:
    day = date(2024, 2, 29)
    ends = [
        ("", ""),
        (
            "{{ '29 February' }}",
            "{% macro m() %}{{ strftime_now('%-d %B') }}{% endmacro %}{{ m() if strftime_now is defined }}",
        ),
    ]
    for plain, dated in ends:
        texts = (template + plain, at_day(template + dated, day))
        seen = [
            byte_tokenizer(chat_template=text).apply_chat_template(
                [{"role": "user", "content": "Hi"}], tokenize=False
            )
            for text in texts
        ]
        assert seen[1] == seen[0]
