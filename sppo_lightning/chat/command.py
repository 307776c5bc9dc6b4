"""``sppo-lightning chat``: its arguments, and the lines that a user types."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from sppo_lightning.chat.answers import Sampling
from sppo_lightning.chat.choices import Choice, choose
from sppo_lightning.chat.policies import PolicyShelf
from sppo_lightning.chat.screen import Screen
from sppo_lightning.chat.session import Session, checked_max_tokens, checked_temperature
from sppo_lightning.policy.pretrained import DTYPES
from sppo_lightning.types import UserError, first_line

SUMMARY = "Talk to a policy in the terminal, or to two of them side by side; /help lists what can be typed."


def chat(
    policy: str,
    beside: str | None = None,
    temperature: float | None = None,
    max_tokens: int = 512,
    seed: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Talk to a policy in the terminal, or to two of them side by side; /help lists what can be typed.

    Messages come from standard input, a line each; without a terminal the output is plain.

    Args:
        policy: folder of a run, whose last policy it is; a model's folder, an adapter's, a hub id or a .gguf file.
        beside: a second policy that answers the same messages: such a one too, or ``initial``, ``best`` or the number
            of an iteration of the run.
        temperature: divides the logits; 0: the most likely token each time; default: the run's, or 1.
        max_tokens: longest answer.
        seed: decides all answers; default: others each time.
        device: where to compute, e.g. ``cuda``; ``auto``: a GPU if there is one.
        dtype: of the weights; ``auto``: as the run computed, else what the device is fast in.

    Raises:
        UserError: if there is no such policy.
    """
    from rich.console import Console

    place = _device(device)
    chosen = choose(policy, device=place)
    other = None if beside is None else choose(beside, device=place, run=chosen.run)
    sampling = _sampling(chosen, temperature, checked_max_tokens(max_tokens))
    shelf = PolicyShelf(place, DTYPES.get(dtype))
    talked_to = shelf.load(chosen)
    second = None if other is None else shelf.load(other)
    screen = Screen(Console(highlight=False))
    session = Session(shelf, talked_to, second, sampling=sampling, screen=screen, seed=seed)
    screen.introduce([each for each in (talked_to, second) if each is not None])
    if sys.stdin.isatty():
        screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    session.run(_typed(screen) if sys.stdin.isatty() else iter(sys.stdin))


def _sampling(choice: Choice, temperature: float | None, max_tokens: int) -> Sampling:
    """Return how answers are sampled: as the run does, where nothing else is said."""
    given: dict[str, Any] = {}
    if choice.run is not None:
        given = choice.run.config["data"]["generator"].get("init_args") or {}
    own = float(given.get("temperature", 1.0))
    return Sampling(
        own if temperature is None else checked_temperature(temperature),
        float(given.get("top_p", 1.0)),
        int(given.get("top_k", 0)),
        max_tokens,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}): leave it out") from error


def _typed(screen: Screen) -> Iterator[str]:
    """Yield the lines that a user types, until Ctrl-D."""
    import readline  # noqa: F401  # input() edits lines and remembers them

    while (line := _line(screen)) is not None:
        yield line


def _line(screen: Screen) -> str | None:
    """Return what a user types; ``None`` after Ctrl-D."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        screen.note("Ctrl-D or /quit leaves")
        return ""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning chat``.

    Raises:
        UserError: if they are no valid arguments, or there is no such policy.
    """
    import transformers.utils.logging
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="sppo-lightning chat", exit_on_error=False, description=SUMMARY)
    parser.add_argument("policy", type=str, help="folder of a run or a model, a hub id or a .gguf file")
    parser.add_function_arguments(chat, skip={"policy"}, as_group=False)
    try:
        given = parser.parse_args(list(args)).as_dict()
    except (ArgumentError, ValueError) as error:
        raise UserError(f"chat: {' '.join(str(error).split())}") from error
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing(_enable)?` is deprecated.*")
    chat(**given)
