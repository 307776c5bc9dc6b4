"""Prompts to token ids: what a chat template takes and refuses, the system prompt, prompts that are too long."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import CHAT_TEMPLATE, byte_tokenizer

from sppo_lightning.prompts import chat_template
from sppo_lightning.prompts.encoding import encode_prompts
from sppo_lightning.prompts.sets import PromptSets
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.types import Message, Prompt, UserError

BOS, EOS = 0, 1
LINUX = sys.platform == "linux"


def user(text: str) -> Message:
    return Message(role="user", content=text)


def prompt(text: str, *, id: str = "p") -> Prompt:
    return Prompt(id=id, text=text, messages=(user(text),))


def test_messages_need_a_chat_template() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    item = Prompt("p7", "Hi", (Message(role="system", content="S"), user("Hi")))
    with pytest.raises(UserError) as error:
        encode_prompts(tokenizer, [item], max_tokens=100)
    assert str(error.value) == (
        "prompt 'p7': the tokenizer has no chat template, so that prompts must be plain text: use 'prompt' "
        "instead of 'messages', or an instruct model"
    )


def test_a_template_that_refuses_a_role() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    item = Prompt("p7", "Hi", (Message(role="system", content="S"), user("Hi")))
    with pytest.raises(UserError, match=r"prompt 'p7': .* refuses the roles system, user \(no system role\)"):
        encode_prompts(byte_tokenizer(chat_template=template), [item], max_tokens=100)


def test_overlong_prompts_are_dropped_whole_and_listed() -> None:
    """``<bos><user>…<assistant>`` is 18 tokens around the text: 20 tokens take a text of two."""
    tokenizer = byte_tokenizer()
    items = [prompt("ab", id="fits"), prompt("abc", id="long"), prompt("a" * 50, id="longer")]
    kept, too_long = encode_prompts(tokenizer, items, max_tokens=20)
    assert [(item.prompt.id, len(item.token_ids)) for item in kept] == [("fits", 20)]
    assert tokenizer.decode(kept[0].token_ids) == "<bos><user>ab<assistant>"
    assert too_long == ["long", "longer"]


def test_a_prompt_that_is_left_out_shifts_no_others() -> None:
    items = [
        prompt("a" * 50, id="long"),
        prompt("ab", id="p1"),
        prompt("a" * 60, id="longer"),
        prompt("cd", id="p2"),
    ]
    for given in (items, PromptTable(items)):
        kept, too_long = encode_prompts(byte_tokenizer(), given, max_tokens=20)
        assert [item.prompt for item in kept] == [items[1], items[3]]
        assert [byte_tokenizer().decode(item.token_ids)[-13:-11] for item in kept] == ["ab", "cd"]
        assert list(kept.by_id()) == kept.ids == ["p1", "p2"]
        assert too_long == ["long", "longer"]


# -------------------------------------------------------------- system prompts


def encoded(*items: Prompt, **settings: Any) -> list[str]:
    """The conversations as the policy sees them."""
    tokenizer = byte_tokenizer()
    kept, _ = encode_prompts(tokenizer, items, **{"max_tokens": 100, **settings})
    return [tokenizer.decode(item.token_ids) for item in kept]


def test_a_system_prompt_opens_the_conversations_that_have_none() -> None:
    own = Message(role="system", content="Be kind.")
    turns = (user("Hi"), Message(role="assistant", content="Yes?"), user("Go"))
    items = [prompt("Hi"), Prompt("q", "Hi", (own, user("Hi"))), Prompt("r", "Hi", turns)]
    assert encoded(*items, system_prompt="Be brief.") == [
        "<bos><system>Be brief.<user>Hi<assistant>",
        "<bos><system>Be kind.<user>Hi<assistant>",
        "<bos><system>Be brief.<user>Hi<assistant>Yes?<eos><user>Go<assistant>",
    ]
    assert encoded(*items)[0] == "<bos><user>Hi<assistant>"


def test_a_system_message_later_on_is_no_opening() -> None:
    turns = (user("Hi"), Message(role="system", content="Be kind."), user("Go"))
    assert encoded(Prompt("q", "Hi", turns), system_prompt="Be brief.") == [
        "<bos><system>Be brief.<user>Hi<system>Be kind.<user>Go<assistant>"
    ]


def test_the_system_prompt_is_no_part_of_the_prompt_itself() -> None:
    """A reward reads the messages that the file holds."""
    item = prompt("Hi")
    (kept,), _ = encode_prompts(byte_tokenizer(), [item], max_tokens=100, system_prompt="Be brief.")
    assert kept.prompt == item
    assert item.messages == (user("Hi"),)


def test_the_system_prompt_counts_towards_the_longest_prompt() -> None:
    """``<bos><user>ab<assistant>`` is 20 tokens, ``<system>S`` another nine."""
    item = prompt("ab", id="p7")
    for limit, too_long in ((29, []), (28, ["p7"])):
        found = encode_prompts(byte_tokenizer(), [item], max_tokens=limit, system_prompt="S")
        assert found.too_long == too_long
    assert encode_prompts(byte_tokenizer(), [item], max_tokens=20).too_long == []


def test_an_empty_system_prompt_is_one() -> None:
    assert encoded(prompt("Hi"), system_prompt="") == ["<bos><system><user>Hi<assistant>"]


def test_a_system_prompt_needs_a_chat_template() -> None:
    """Told once for the setting, not for a prompt; and also where there are none."""
    for items in ([prompt("Hi")], []):
        with pytest.raises(UserError) as error:
            encode_prompts(
                byte_tokenizer(chat_template=None), items, max_tokens=100, system_prompt="Be brief."
            )
        assert str(error.value) == (
            "data.system_prompt is set, but the policy's tokenizer has no chat template to put it into: leave it "
            "out, or use an instruct model"
        )


def test_a_template_that_refuses_the_system_prompt() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(
        UserError, match=r"^the model's chat template has no place for data\.system_prompt: leave"
    ):
        encode_prompts(
            byte_tokenizer(chat_template=template), [prompt("Hi", id="p7")], max_tokens=100, system_prompt="S"
        )


def test_a_template_that_takes_no_notice_of_the_system_prompt() -> None:
    """One whose default is the system prompt says it all the same."""
    asked = "{{ messages[-1].content }}"
    items = [prompt("Hi"), Prompt("own", "x", (Message(role="system", content="Mine"), user("x")))]
    with pytest.raises(
        UserError, match=r"^the model's chat template has no place for data\.system_prompt: leave"
    ):
        encode_prompts(byte_tokenizer(chat_template=asked), items, max_tokens=100, system_prompt="Be brief.")
    default = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Be brief.{% endif %}"
    found = encode_prompts(
        byte_tokenizer(chat_template=f"{default}{asked}"), items, max_tokens=100, system_prompt="Be brief."
    )
    assert len(found.kept) == 2


# ------------------------------------------------------- what else a turn holds

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool['function']['name'] }}{% endfor %}{% for message in messages %}"
    "<{{ message['role'] }}>{% if message['reasoning_content'] %}({{ message['reasoning_content'] }}){% endif %}"
    "{% for call in message['tool_calls'] or [] %}[{{ call['function']['name'] }}]{% endfor %}{{ message['content'] }}"
    "{% endfor %}{% if enable_thinking %}<think>{% endif %}"
)


def read_and_encode(record: dict[str, Any], folder: Path, template: str | None, **settings: Any) -> str:
    """What the policy sees of a record, all the way from its file."""
    path = folder / "p.jsonl"
    path.write_text(json.dumps({"prompt": "first"}) + "\n" + json.dumps(record) + "\n")
    sets = PromptSets({"prompts": str(path)}, 200)
    tokenizer = byte_tokenizer(chat_template=template)
    return tokenizer.decode(sets.encode("prompts", tokenizer, **settings)[1].token_ids)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
CALLED = [
    {"role": "user", "content": "Add"},
    CALL,
    {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
]


def test_tool_calls_and_tools_reach_the_template(tmp_path: Path) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        record = {"messages": CALLED, "tools": tools}
        assert read_and_encode(record, tmp_path, TOOL_TEMPLATE) == "<tool>add<user>Add<assistant>[add]<tool>3"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_each_of_its_names(tmp_path: Path, name: str) -> None:
    turns = [user("Add"), {"role": "assistant", "content": "3", name: "1 + 2"}, user("And?")]
    seen = read_and_encode({"messages": turns}, tmp_path, TOOL_TEMPLATE)
    assert seen == "<user>Add<assistant>(1 + 2)3<user>And?"


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    for value, end in ((True, "<think>"), (False, "")):
        seen = read_and_encode(
            {"prompt": "Hi"}, tmp_path, TOOL_TEMPLATE, arguments={"enable_thinking": value}
        )
        assert seen == "<user>Hi" + end


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": CALLED}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Eve"}]}, "name"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": "b", "thinking": "c"}, user("d")]},
            "thinking",
        ),
        ({"prompt": "Hi", "tools": TOOLS}, "tools"),
    ],
)
def test_what_the_template_would_drop_is_refused_by_file_and_line(
    record: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=rf"p\.jsonl:2: prompt '\w+': the model's chat template takes no notice of '{name}'"
    ):
        read_and_encode(record, tmp_path, CHAT_TEMPLATE)


def test_empty_fields_of_a_turn_are_none(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Hi", "tool_calls": None, "name": "", "thinking": [], "weight": 1}
    assert (
        read_and_encode({"messages": [turn], "tools": []}, tmp_path, CHAT_TEMPLATE)
        == "<bos><user>Hi<assistant>"
    )


def test_prompts_that_differ_in_their_tool_calls_are_two() -> None:
    """Their ids come from all that the policy sees."""
    table = PromptTable(
        [Prompt("a", "Add", (user("Add"), Message(role="assistant", content="", tool_calls=[1])))]
    )
    assert table[0].messages[1] == {"role": "assistant", "content": "", "tool_calls": [1]}


# --------------------------------------------------------------- broken templates


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages + 1 }}",
        "{{ 'a' * messages }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['role'] }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% if messages %}{{ messages | nothing }}{% endif %}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_is_not_the_prompts_fault(template: str) -> None:
    with pytest.raises(
        UserError, match=r"prompt 'p7': the model's chat template fails \(\w+: .*name another one with"
    ):
        encode_prompts(byte_tokenizer(chat_template=template), [prompt("Hi", id="p7")], max_tokens=100)


def test_a_template_that_makes_nothing_of_a_prompt() -> None:
    with pytest.raises(
        UserError, match=r"prompt 'p7': .* makes not a single token of a conversation: name another"
    ):
        encode_prompts(byte_tokenizer(chat_template="{# nothing #}"), [prompt("Hi", id="p7")], max_tokens=100)


def test_a_template_that_makes_the_same_of_all_prompts() -> None:
    """The model would never see what they say."""
    tokenizer = byte_tokenizer(chat_template="You are a helpful assistant.")
    prompts = [prompt(text, id=text) for text in ("Hi", "Why?", "Where?")]
    with pytest.raises(
        UserError, match=r"^the model's chat template makes the same of all prompts, .*: name another"
    ):
        encode_prompts(tokenizer, prompts, max_tokens=100)
    assert encode_prompts(tokenizer, prompts[:1], max_tokens=100).kept.ids == ["Hi"]
    same = [prompt("Hi", id="a"), prompt("Hi", id="b")]
    assert encode_prompts(byte_tokenizer(), same, max_tokens=100).kept.ids == ["a", "b"]


DOUBLING = (
    "{% set held = namespace(text='a' * 1024) %}{% for i in range(40) %}{% set held.text = held.text + held.text %}"
    "{% endfor %}{{ messages[0].content }}"
)


@pytest.mark.parametrize(
    ("template", "wording"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
            "fails .OutOfTimeError: not done after 0.5 s.: name another one",
        ),
        (
            "{% set x = 9 ** (9 ** 9) %}{{ messages[0].content }}",
            "fails .OutOfTimeError: not done after 0.5 s.: name another one",
        ),
        pytest.param(
            DOUBLING,
            "fails .(MemoryError|OutOfTimeError): ",
            marks=pytest.mark.skipif(not LINUX, reason="no limit"),
        ),
        (
            "{{ 'a' * 10 ** 6 }}{{ messages[0].content }}",
            "makes 1,000,002 characters of one conversation: name",
        ),
        ("{{ 'a' | center(10 ** 6) }}", "makes 1,000,000 characters of one conversation: name another one"),
    ],
)
def test_a_template_that_never_ends_or_grows(
    template: str, wording: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox bounds neither time nor memory."""
    monkeypatch.setattr(chat_template, "LONGEST_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "LONGEST_TEXT", 10**5)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"prompt 'p7': the model's chat template {wording}"):
        encode_prompts(byte_tokenizer(chat_template=template), [prompt("Hi", id="p7")], max_tokens=100)
    assert time.monotonic() - start < 20
