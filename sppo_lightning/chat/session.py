"""A chat: what was said to one or two policies, and the commands that a user may type between two messages."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from sppo_lightning.chat.answers import Answer, Sampling, answer_logps, decoded, sampled_tokens
from sppo_lightning.chat.choices import choose
from sppo_lightning.chat.policies import ChatPolicy, PolicyShelf
from sppo_lightning.chat.saving import save_conversation
from sppo_lightning.chat.screen import Screen
from sppo_lightning.types import Message, UserError

OFF = "off"


class Turn(NamedTuple):
    """The last message's answer."""

    prompt: list[int]  # token ids
    answer: Answer


class Voice:
    """A policy, and what was said to it and by it.

    Args:
        policy: that answers.
        messages: that were said before.
    """

    def __init__(self, policy: ChatPolicy, messages: Sequence[Message] = ()) -> None:
        self.policy = policy
        self.messages = list(messages)
        self.last: list[Message] | None = None  # what the last answer answers

    def begin(self, text: str, sampling: Sampling, *, seed: int) -> tuple[Answer, Iterator[int]]:
        """Return the answer to a message, to be filled by the tokens that are returned too."""
        prompt = self.policy.encode([*self.messages, Message(role="user", content=text)])
        return Answer(self.policy), sampled_tokens(self.policy, prompt, sampling, seed=seed)

    def end(self, text: str, answer: Answer) -> None:
        """Take a message and its answer up."""
        self.last = [*self.messages, Message(role="user", content=text)]
        self.messages = [*self.last, Message(role="assistant", content=answer.text)]


class Session:
    """A chat that lasts until the user ends it.

    Args:
        shelf: where policies come from.
        policy: that is talked to.
        beside: another one that answers the same messages.
        sampling: how both answer.
        screen: where it is shown.
        seed: decides all answers; ``None``: others each time.
    """

    def __init__(
        self,
        shelf: PolicyShelf,
        policy: ChatPolicy,
        beside: ChatPolicy | None,
        *,
        sampling: Sampling,
        screen: Screen,
        seed: int | None = None,
    ) -> None:
        self.shelf = shelf
        self.voices = [Voice(each) for each in (policy, beside) if each is not None]
        self.sampling = sampling
        self.screen = screen
        self._seeds = random.Random(seed)
        self._answers: list[Answer] = []  # the last, one a voice
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "iteration": ("N|best|initial", "talk to another policy of the run", self._iteration),
            "beside": ("initial|N|best|RUN_OR_MODEL|off", "let a second policy answer, too", self._beside),
            "logprobs": ("[beside]", "the last answer, token by token: how the two differ", self._logprobs),
            "save": ("FILE.jsonl", "add the conversation to a prompt file", self._save),
            "temperature": ("T", "0: the most likely token each time", self._temperature),
            "max-tokens": ("N", "longest answer", self._max_tokens),
            "reset": ("", "begin a new conversation", self._reset),
            "help": ("", "this list", self._help),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer messages and obey commands until there are no more, or one says ``/quit``."""
        for line in lines:
            text = line.strip()
            try:
                if text.startswith("/") and not text.startswith("//"):
                    name, _, argument = text[1:].partition(" ")
                    if name == "quit":
                        return
                    self._obey(name, argument.strip())
                elif text:
                    self._say(text.removeprefix("/") if text.startswith("//") else text)
            except UserError as error:
                self.screen.note(str(error))
            except KeyboardInterrupt:
                self.screen.note("interrupted: the message counts as not said")

    def _obey(self, name: str, argument: str) -> None:
        if name not in self.commands:
            raise UserError(
                f"there is no command /{name}: /help lists them, // begins a message with a slash"
            )
        self.commands[name][2](argument)

    def _say(self, text: str) -> None:
        seed = self._seeds.getrandbits(32)
        begun = [voice.begin(text, self.sampling, seed=seed) for voice in self.voices]
        with _interruption() as interrupted:
            self.screen.stream(begun, interrupted)
        self._answers = [answer for answer, _ in begun]
        for voice, answer in zip(self.voices, self._answers, strict=True):
            voice.end(text, answer)

    # ------------------------------------------------------------------ commands

    def _iteration(self, argument: str) -> None:
        run = self.voices[0].policy.choice.run
        if run is None:
            raise UserError(
                f"{self.voices[0].policy.name} is no run's, and has no iterations: /beside adds another"
            )
        if argument not in ("best", "initial") and not argument.isdecimal():
            raise UserError(f"/iteration {argument}: give a number from 0, best or initial")
        self._put(0, argument)

    def _beside(self, argument: str) -> None:
        if argument == OFF:
            del self.voices[1:]
            self._forget_answers()
            return
        if not argument:
            raise UserError("/beside: name initial, an iteration, a run's or a model's folder, or off")
        self._put(1, argument)

    def _put(self, place: int, given: str) -> None:
        """Let another policy answer in a place, which goes on with the conversation that is there."""
        run = self.voices[0].policy.choice.run
        policy = self.shelf.load(choose(given, device=self.shelf.device, run=run))
        messages = self.voices[min(place, len(self.voices) - 1)].messages
        self.voices[place : place + 1] = [Voice(policy, messages)]
        self._forget_answers()
        self.screen.introduce([voice.policy for voice in self.voices])

    def _forget_answers(self) -> None:
        self._answers = []
        self.shelf.keep([voice.policy for voice in self.voices])

    def _logprobs(self, argument: str) -> None:
        if argument not in ("", "beside"):
            raise UserError(f"/logprobs {argument}: nothing or beside, whose answer to read")
        if len(self.voices) < 2:
            raise UserError("/logprobs compares two policies: name the second with /beside initial")
        if not self._answers:
            raise UserError("/logprobs reads the last answer: say something first")
        policies = [voice.policy for voice in self.voices]
        if not policies[0].same_vocabulary(policies[1]):
            raise UserError(
                f"/logprobs: {policies[0].name} and {policies[1].name} have other vocabularies, so that a token of one "
                "means nothing to the other"
            )
        whose = 1 if argument else 0
        token_ids = self._answers[whose].token_ids
        asked = self.voices[whose].last
        if not token_ids or asked is None:
            raise UserError("/logprobs: the last answer has no tokens")
        first, second = (answer_logps(policy, policy.encode(asked), token_ids) for policy in policies)
        texts = [_shown(policies[whose], token) for token in token_ids]
        self.screen.differences(policies[0].name, policies[1].name, texts, (first - second).tolist())

    def _save(self, argument: str) -> None:
        voice = self.voices[0]
        if not argument:
            raise UserError("/save: name a file that ends with .jsonl")
        if not voice.messages:
            raise UserError("/save: nothing was said yet")
        path = Path(argument).expanduser()
        count = save_conversation(path, voice.messages, conversational=voice.policy.conversational)
        self.screen.note(f"{path} holds {count} prompt(s) now; data.prompts={path} reads them")

    def _temperature(self, argument: str) -> None:
        self.sampling.temperature = checked_temperature(_number(argument, float, "/temperature"))

    def _max_tokens(self, argument: str) -> None:
        self.sampling.max_tokens = checked_max_tokens(_number(argument, int, "/max-tokens"))

    def _reset(self, argument: str) -> None:
        self.voices = [Voice(voice.policy) for voice in self.voices]
        self._answers = []

    def _help(self, argument: str) -> None:
        rows = [(f"/{name} {of}".strip(), what) for name, (of, what, _) in self.commands.items()]
        self.screen.table([*rows, ("/quit", "leave; so does Ctrl-D")])


def checked_temperature(value: float) -> float:
    """Return a temperature that can be sampled with.

    Raises:
        UserError: if it is none.
    """
    if not 0 <= value < float("inf"):
        raise UserError(f"temperature {value:g} must be 0 or more")
    return value


def checked_max_tokens(value: int) -> int:
    """Return how many tokens an answer may have.

    Raises:
        UserError: if it is none.
    """
    if value < 1:
        raise UserError(f"max-tokens {value} must be at least 1")
    return value


def _number(text: str, kind: Callable[[str], Any], command: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{command} {text}: give a number") from error


def _shown(policy: ChatPolicy, token: int) -> str:
    """Return what a token looks like; a special one by its name."""
    return decoded(policy.tokenizer, [token]) or str(policy.tokenizer.convert_ids_to_tokens(token))


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C ask for a stop, and yield what says whether it has; a second one interrupts as ever."""
    asked = False

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, take)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
