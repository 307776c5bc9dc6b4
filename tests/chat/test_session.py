"""A chat with tiny policies: what is said, shown and kept, and every command."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat.conftest import CPU, RunMaker
from rich.console import Console

from sppo_lightning.__main__ import main
from sppo_lightning.chat.answers import Answer, Sampling
from sppo_lightning.chat.choices import choose
from sppo_lightning.chat.policies import ChatPolicy, PolicyShelf
from sppo_lightning.chat.screen import Screen
from sppo_lightning.chat.session import Session
from sppo_lightning.export.stored_run import read_run
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.types import Message

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\u202eb[red]c[/red]\r"


class Chat:
    """A session whose screen is a string."""

    def __init__(self, session: Session, output: io.StringIO) -> None:
        self.session = session
        self._output = output

    def say(self, *lines: str) -> str:
        """Return what the screen shows of some lines."""
        start = len(self._output.getvalue())
        self.session.run(iter(lines))
        return self._output.getvalue()[start:]


def a_chat(shelf: PolicyShelf, *policies: ChatPolicy, width: int = 100, terminal: bool = False) -> Chat:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, color_system=None, highlight=False)
    first, second = (*policies, None)[:2]
    assert first is not None
    sampling = Sampling(1.0, 1.0, 0, 8)
    return Chat(Session(shelf, first, second, sampling=sampling, screen=Screen(console), seed=1), output)


@pytest.fixture
def pair(make_run: RunMaker, shelf: PolicyShelf) -> list[ChatPolicy]:
    """Two policies of a run, on one base."""
    run = read_run(make_run("mine", 0, 1, lora=True))
    return [shelf.load(choose(name, device=CPU, run=run)) for name in ("1", "initial")]


def stored(messages: list[Message]) -> list[str]:
    return [message["role"] for message in messages]


# -------------------------------------------------------------------- answers


def test_a_conversation_goes_on(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    chat = a_chat(shelf, policy)
    shown = chat.say("Hello", "", "  And now?  ")
    (voice,) = chat.session.voices
    assert stored(voice.messages) == ["user", "assistant"] * 2
    assert voice.messages[2]["content"] == "And now?"
    assert shown.count("… (cut after 8 tokens)") == 2
    assert policy.name not in shown, "one voice needs no name"


def test_a_seed_makes_the_same_chat(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    first, second = (a_chat(shelf, policy).say("Hello", "Again") for _ in range(2))
    assert first == second
    assert len(set(first.splitlines())) > 1


def test_two_policies_one_after_the_other(shelf: PolicyShelf, pair: list[ChatPolicy]) -> None:
    chat = a_chat(shelf, *pair)
    shown = chat.say("Hello")
    names = [line for line in shown.splitlines() if line.startswith("mine, ")]
    assert names == ["mine, iteration 1", "mine, initial"]
    first, second = (voice.messages[-1]["content"] for voice in chat.session.voices)
    assert first != second


def test_two_policies_in_columns_where_there_is_room(shelf: PolicyShelf, pair: list[ChatPolicy]) -> None:
    shown = a_chat(shelf, *pair, terminal=True).say("Hello")
    assert re.search(r"mine, iteration 1 +mine, initial", shown)
    assert shown.count("(cut after 8 tokens)") == 2
    narrow = a_chat(shelf, *pair, terminal=True, width=60).say("Hello")
    assert not re.search(r"mine, iteration 1 +mine, initial", narrow)


def test_columns_hold_what_is_kept(shelf: PolicyShelf, pair: list[ChatPolicy]) -> None:
    one, two = a_chat(shelf, *pair, terminal=True), a_chat(shelf, *pair)
    one.say("Hello"), two.say("Hello")
    assert [voice.messages for voice in one.session.voices] == [
        voice.messages for voice in two.session.voices
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_answers_do_not_command_the_terminal(
    shelf: PolicyShelf,
    pair: list[ChatPolicy],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    """Each byte is a token of its own, so that every sequence comes in parts."""

    def hostile(policy: ChatPolicy, *args: Any, **options: Any) -> Iterator[int]:
        return iter([*policy.tokenizer(HOSTILE)["input_ids"], 1])

    monkeypatch.setattr("sppo_lightning.chat.session.sampled_tokens", hostile)
    chat = a_chat(shelf, *pair, terminal=terminal)
    shown = chat.say("Hello", "/logprobs", "/save \x1b[2J", "/\x1b]0;x\x07")
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown) if terminal else shown  # Rich moves its own picture
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", own.replace("\r", "") if terminal else own)
    assert "\x1b[2J" not in shown
    assert r"a\x1b]0;owned\x07\x1b[2J\u202eb[red]c[/red]" in shown.replace("\n", "")
    assert chat.session.voices[0].messages[-1]["content"] == HOSTILE, "what is kept is what was said"


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    shelf: PolicyShelf, policy: ChatPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(policy: ChatPolicy, *args: Any, **options: Any) -> Iterator[int]:
        for number in range(1000):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield 70

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("sppo_lightning.chat.session.sampled_tokens", endless)
    chat = a_chat(shelf, policy)
    assert chat.say("Hello").endswith(" … (stopped)\n")
    assert len(chat.session.voices[0].messages[-1]["content"]) == 4
    assert signal.getsignal(signal.SIGINT) is before
    chat.say("And on")
    assert len(chat.session.voices[0].messages) == 4


def test_a_second_ctrl_c_interrupts_at_once(
    shelf: PolicyShelf, policy: ChatPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(policy: ChatPolicy, *args: Any, **options: Any) -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield 70

    monkeypatch.setattr("sppo_lightning.chat.session.sampled_tokens", deaf)
    chat = a_chat(shelf, policy)
    assert "interrupted: the message counts as not said" in chat.say("Hello", "/temperature 1")
    assert chat.session.voices[0].messages == []


def test_a_conversation_that_is_too_long(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    chat = a_chat(shelf, policy)
    assert "has positions for 512 only: /reset begins a new one" in chat.say("x" * 600)
    assert chat.session.voices[0].messages == []


# ------------------------------------------------------------------- commands


def test_iterations_are_switched_and_the_conversation_goes_on(make_run: RunMaker, shelf: PolicyShelf) -> None:
    chat = a_chat(shelf, shelf.load(choose(str(make_run("mine", 0, 1)), device=CPU)))
    chat.say("Hello")
    assert "You talk to mine, iteration 0." in chat.say("/iteration 0")
    assert "You talk to mine, initial." in chat.say("/iteration initial")
    (voice,) = chat.session.voices
    assert (voice.policy.name, stored(voice.messages)) == ("mine, initial", ["user", "assistant"])
    for wrong, message in {
        "7": "holds no policy of iteration 7, only of 0, 1",
        "x": "/iteration x: give a number from 0, best or initial",
        "": "/iteration : give a number",
        "best": "best is not there",
    }.items():
        assert message in chat.say(f"/iteration {wrong}")
    assert chat.session.voices == [voice]


def test_a_model_has_no_iterations(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    chat = a_chat(shelf, policy)
    assert "is no run's, and has no iterations" in chat.say("/iteration 0")
    assert "initial is a policy of a run, and the policy talked to is of none" in chat.say("/beside initial")


def test_a_second_voice_comes_and_goes(
    make_run: RunMaker, shelf: PolicyShelf, pair: list[ChatPolicy], tiny_policy: Path
) -> None:
    chat = a_chat(shelf, pair[0])
    chat.say("Hello")
    assert "You talk to mine, iteration 1 and, beside it, mine, iteration 0." in chat.say("/beside 0")
    assert chat.session.voices[1].messages == chat.session.voices[0].messages
    assert chat.session.voices[1].policy.held is pair[0].held
    chat.say(f"/beside {tiny_policy}", "Hello")
    assert [len(voice.messages) for voice in chat.session.voices] == [4, 4]
    chat.say("/beside off")
    assert len(chat.session.voices) == 1
    assert "/beside: name initial" in chat.say("/beside")


def test_differences_of_log_probs(shelf: PolicyShelf, pair: list[ChatPolicy]) -> None:
    chat = a_chat(shelf, *pair, width=500)
    chat.say("Hello")
    for command in ("/logprobs", "/logprobs beside"):
        numbers, summary = chat.say(command).strip().rsplit("\n", 1)
        nats = [float(number) for number in re.findall(r"\[([+-]\d+\.\d\d)\]", numbers)]
        assert len(nats) == 8
        total = re.search(
            r"^log-prob under mine, iteration 1 less that under mine, initial, .*: (\S+) in all", summary
        )
        assert total is not None
        assert float(total[1]) == pytest.approx(sum(nats), abs=0.1)
        assert any(abs(number) > 0.1 for number in nats)


def test_differences_need_two_policies_of_one_vocabulary_and_an_answer(
    shelf: PolicyShelf, pair: list[ChatPolicy]
) -> None:
    assert "/logprobs compares two policies" in a_chat(shelf, pair[0]).say("Hello", "/logprobs")
    chat = a_chat(shelf, *pair)
    assert "/logprobs reads the last answer: say something first" in chat.say("/logprobs")
    assert "/logprobs x: nothing or beside" in chat.say("/logprobs x")
    pair[1].tokenizer.add_tokens(["new"])
    shown = chat.say("Hello", "/logprobs")
    assert "/logprobs: mine, iteration 1 and mine, initial have other vocabularies" in shown


def test_what_is_saved_can_be_trained_on(shelf: PolicyShelf, policy: ChatPolicy, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    chat = a_chat(shelf, policy)
    assert "/save: nothing was said yet" in chat.say(f"/save {path}")
    assert "talk.jsonl holds 1 prompt(s) now" in chat.say("Hello", f"/save {path}").replace("\n", "")
    (prompt,) = read_prompts(str(path), key="data.prompts")
    assert list(prompt.messages) == chat.session.voices[0].messages[:1]
    assert "/save: name a file that ends with .jsonl" in chat.say("/save")
    assert "does not end with .jsonl" in chat.say(f"/save {tmp_path}/x.txt")


def test_settings(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    chat = a_chat(shelf, policy)
    chat.say("/temperature 0", "/max-tokens 3", "Hello")
    first = chat.session.voices[0].messages
    chat.say("/reset")
    assert chat.session.voices[0].messages == []
    chat.say("Hello")
    assert chat.session.voices[0].messages == first, "greedy"
    assert "(cut after 3 tokens)" in chat.say("Again")
    for wrong, message in {
        "/temperature -1": "temperature -1 must be 0 or more",
        "/temperature nan": "temperature nan must be 0 or more",
        "/temperature hot": "/temperature hot: give a number",
        "/max-tokens 0": "max-tokens 0 must be at least 1",
        "/max-tokens": "/max-tokens : give a number",
        "/nonsense": "there is no command /nonsense: /help lists them",
    }.items():
        assert message in chat.say(wrong)


def test_help_lists_all_and_a_slash_can_be_said(shelf: PolicyShelf, policy: ChatPolicy) -> None:
    chat = a_chat(shelf, policy)
    shown = chat.say("/help")
    assert all(f"/{name}" in shown for name in (*chat.session.commands, "quit"))
    chat.say("//etc is a folder", "/quit", "not said any more")
    assert [each["content"] for each in chat.session.voices[0].messages[::2]] == ["/etc is a folder"]


def test_an_answer_that_the_policy_ended(policy: ChatPolicy) -> None:
    output = io.StringIO()
    Screen(Console(file=output)).stream([(Answer(policy), iter([70, 71, 1]))], lambda: False)
    assert output.getvalue() == policy.tokenizer.decode([70, 71]) + "\n"


# -------------------------------------------------------------------- command


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_command_reads_a_pipe(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Hello", "/logprobs")
    root = make_run("mine", 0, lora=True)
    capsys.readouterr()
    main(["chat", str(root), "--beside=initial", "--max_tokens=4", "--seed=1"])
    shown, errors = capsys.readouterr()
    assert shown.startswith(
        "You talk to mine, iteration 0 and, beside it, mine, initial.\nmine, iteration 0\n"
    )
    assert "log-prob under mine, iteration 0 less that under mine, initial" in shown
    assert "\x1b" not in shown
    assert not errors


def test_a_run_that_has_just_begun(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch)
    main(["chat", str(make_run("young"))])
    shown = capsys.readouterr().out
    assert "You talk to young, initial." in shown
    assert "has no finished iteration yet" in shown


def test_a_base_model_says_that_it_forgets(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch)
    main(["chat", str(make_run("plain", chat_template="plain"))])
    assert "has no chat template: it goes on with your text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "chat: the following arguments are required: policy"),
        (["{policy}", "--loud=1"], "chat: unrecognized arguments: --loud=1"),
        (["{policy}", "--temperature=-1"], "temperature -1 must be 0 or more"),
        (["{policy}", "--max_tokens=0"], "max-tokens 0 must be at least 1"),
        (["{policy}", "--device=abacus"], "--device abacus cannot be used here"),
        (["{policy}", "--dtype=int8"], "chat: .*dtype"),
        (
            ["{policy}", "--beside=initial"],
            "initial is a policy of a run, and the policy talked to is of none",
        ),
        (["{policy}", "--beside={empty}"], "is no run .* and no model"),
        (["{empty}"], "is no run .* and no model"),
    ],
)
def test_arguments_that_are_wrong(
    args: list[str], message: str, tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["chat", *(arg.format(policy=tiny_policy, empty=tmp_path) for arg in args)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
