"""What a chat looks like: answers as they grow, in columns where the terminal is wide enough for two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sppo_lightning.chat.answers import Answer
from sppo_lightning.chat.policies import ChatPolicy
from sppo_lightning.text import for_terminal

NARROWEST = 36  # characters of a column that is still easy to read
BETWEEN = 0.1  # seconds between two pictures of answers side by side
LARGE = 1.0  # nats that a token's log-probs differ by at least, to stand out
Begun = tuple[Answer, Iterator[int]]


class Screen:
    """A terminal, or a file that plain lines go to.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """Say something that no policy said."""
        self.console.print(Text(for_terminal(text), style="yellow"), soft_wrap=True)

    def introduce(self, policies: Sequence[ChatPolicy]) -> None:
        """Say who answers."""
        names = " and, beside it, ".join(policy.name for policy in policies)
        self.console.print(Text(for_terminal(f"You talk to {names}."), style="bold"), soft_wrap=True)
        for policy in policies:
            if policy.choice.note is not None:
                self.note(policy.choice.note)
            if not policy.conversational:
                self.note(
                    f"{policy.name} has no chat template: it goes on with your text, and does not know what was said "
                    "before."
                )

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show rows of two cells."""
        grid = Table.grid(padding=(0, 2))
        for row in rows:
            grid.add_row(*(Text(for_terminal(cell)) for cell in row))
        self.console.print(grid)

    def stream(self, begun: Sequence[Begun], interrupted: Callable[[], bool]) -> None:
        """Show answers while they grow.

        Args:
            begun: answers, and their tokens to come.
            interrupted: whether the user wants no more of them.
        """
        if len(begun) > 1 and self.in_columns:
            self._stream_in_columns(begun, interrupted)
            return
        for answer, tokens in begun:
            if len(begun) > 1:
                self.console.print(Text(for_terminal(answer.policy.name), style="bold"), soft_wrap=True)
            for _ in _grown(answer, tokens, interrupted, self._write):
                pass
            self._write(f"{answer.end()}{_ending(answer)}\n")

    @property
    def in_columns(self) -> bool:
        """Whether two answers go next to each other."""
        return self.console.is_terminal and self.console.width >= 2 * NARROWEST

    def _write(self, text: str) -> None:
        self.console.file.write(for_terminal(text))
        self.console.file.flush()

    def _stream_in_columns(self, begun: Sequence[Begun], interrupted: Callable[[], bool]) -> None:
        answers = [answer for answer, _ in begun]
        growing = [_grown(*each, interrupted, lambda text: None) for each in begun]
        shown = time.monotonic()
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while growing:
                growing = [each for each in growing if next(each, None) is not None]
                if time.monotonic() > shown + BETWEEN:
                    live.update(self._columns(answers, lines=self.console.height - 2), refresh=True)
                    shown = time.monotonic()
        for answer in answers:
            answer.end()
        self.console.print(self._columns(answers, lines=None))

    def _columns(self, answers: Sequence[Answer], *, lines: int | None) -> Table:
        """Return answers next to each other; ``lines``: show the last ones only."""
        table = Table(box=None, expand=True, padding=(0, 1), collapse_padding=True)
        width = self.console.width // len(answers) - 2
        cells = []
        for answer in answers:
            table.add_column(Text(for_terminal(answer.policy.name)), ratio=1, overflow="fold")
            cell = Text(for_terminal(answer.text + (_ending(answer) if lines is None else "")))
            if lines is not None:
                cell = Text("\n").join(cell.wrap(self.console, width)[-lines:])
            cells.append(cell)
        table.add_row(*cells)
        return table

    def differences(self, first: str, second: str, tokens: Sequence[str], nats: Sequence[float]) -> None:
        """Show by how much more likely each token is to the first policy than to the second.

        Args:
            first: name of a policy.
            second: of the other.
            tokens: texts.
            nats: differences of their log-probs, as many.
        """
        shown = Text()
        for token, difference in zip(tokens, nats, strict=True):
            style = "green" if difference > 0 else "red"
            shown.append(_visible(token), f"bold {style}" if abs(difference) >= LARGE else style)
            shown.append(f"[{difference:+.2f}]", "dim")
            if token.endswith("\n"):
                shown.append("\n")
        self.console.print(shown)
        total = sum(nats)
        self.note(
            f"log-prob under {first} less that under {second}, in nats, behind each token: {total:+.2f} in all, "
            f"{total / len(nats):+.3f} a token"
        )


def _grown(
    answer: Answer, tokens: Iterator[int], interrupted: Callable[[], bool], write: Callable[[str], None]
) -> Iterator[int]:
    """Take an answer's tokens up one by one, and write what they add."""
    for token in tokens:
        write(answer.add(token))
        yield token
        if interrupted():
            answer.stopped = True
            return


def _ending(answer: Answer) -> str:
    """Return what is said of an answer that its policy did not end."""
    if answer.stopped:
        return " … (stopped)"
    return "" if answer.finished else f" … (cut after {len(answer.token_ids)} tokens)"


def _visible(token: str) -> str:
    """Return a token in which white space can be seen and nothing breaks the line."""
    return for_terminal(token.replace("\n", "↵").replace("\t", "⇥"))
