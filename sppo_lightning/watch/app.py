"""The screen of ``sppo-lightning watch``: an overview, the prompts of an iteration, the held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from rich.console import Group
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Header, Sparkline, Static, TabbedContent, TabPane

from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError
from sppo_lightning.watch.reading import RunReader, RunView
from sppo_lightning.watch.texts import (
    ResponseRow,
    held_out_answers,
    held_out_prompts,
    prompts_of,
    responses_to,
)
from sppo_lightning.watch.words import (
    caption,
    cell,
    decisions_text,
    iterations_table,
    number,
    responses_text,
    results_table,
    status,
)

BETWEEN = 1.0  # seconds between two looks at the run


class Responses(Screen[None]):
    """A prompt and its responses.

    Args:
        prompt: its text.
        rows: the responses.
    """

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,backspace", "app.pop_screen", "Back")]

    def __init__(self, prompt: str, rows: list[ResponseRow]) -> None:
        super().__init__()
        self._shown = responses_text(prompt, rows)

    def compose(self) -> ComposeResult:
        """Make the parts of the screen."""
        with VerticalScroll():
            yield Static(self._shown, id="responses")
        yield Footer()


class WatchApp(App[None]):
    """Watches a run.

    Args:
        reader: of the run.
    """

    CSS = """
    Sparkline { height: 3; margin: 0 1 1 1; }
    Static { padding: 0 1; }
    #troubles { color: $warning; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("1", "show('overview')", "Overview"),
        ("2", "show('prompts')", "Prompts"),
        ("3", "show('held-out')", "Held-out"),
        ("left_square_bracket", "iteration(-1)", "Iteration before"),
        ("right_square_bracket", "iteration(1)", "Iteration after"),
        ("q", "quit", "Quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, reader: RunReader) -> None:
        super().__init__()
        self.reader = reader
        self.view: RunView = reader.read()
        self._iteration: int | None = None  # whose prompts are shown; None: the latest
        self._texts: dict[str, str] = {}  # of the prompts in the tables, by row key
        self._listed: object = None  # what the tables were made of

    def compose(self) -> ComposeResult:
        """Make the parts of the screen."""
        yield Header()
        with TabbedContent(initial="overview"):
            with TabPane("Overview", id="overview"), VerticalScroll():
                yield Static(id="status")
                yield Static(id="troubles")
                yield Static(id="reward-caption")
                yield Sparkline([], id="reward")
                yield Static(id="loss-caption")
                yield Sparkline([], id="loss")
                yield Static(id="tables")
            with TabPane("Prompts", id="prompts"):
                yield Static(id="prompts-caption")
                yield DataTable(id="prompts-table", cursor_type="row")
            with TabPane("Held-out", id="held-out"):
                yield DataTable(id="held-out-table", cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        """Show the run, and look at it again and again."""
        self.title = for_terminal(self.view.name)
        self._table("prompts").add_columns("difficulty", "selected", "rewards", "prompt")
        self._table("held-out").add_columns("before", "after", "prompt")
        self._show()
        self.set_interval(BETWEEN, self.look)

    def look(self) -> None:
        """Read what has changed, and show it."""
        self.view = self.reader.read()
        self._show()

    def _show(self) -> None:
        view = self.view
        self._write("status", [status(view)])
        self._write("troubles", view.troubles)
        rewards = [result.reward for result in view.results]
        for name, label, values in (
            ("reward", "held-out reward", rewards),
            ("loss", "training loss", view.losses),
        ):
            self._write(f"{name}-caption", [caption(label, values)])
            self.query_one(f"#{name}", Sparkline).data = values
        decided = map(cell, decisions_text(view.decisions))
        shown = Group(results_table(view), iterations_table(view), *decided)
        self.query_one("#tables", Static).update(shown)
        self._list()

    def _write(self, name: str, lines: Iterable[str]) -> None:
        self.query_one(f"#{name}", Static).update(Text(for_terminal("\n".join(lines))))

    def _table(self, name: str) -> DataTable[Text]:
        table: DataTable[Text] = self.query_one(f"#{name}-table", DataTable)
        return table

    # ---------------------------------------------------------- prompts and texts

    @property
    def iteration(self) -> int | None:
        """Whose prompts are shown; ``None`` before the first has begun."""
        numbers = self.reader.folder.iteration_numbers()
        return self._iteration if self._iteration in numbers else max(numbers, default=None)

    @property
    def evaluated(self) -> int:
        """Iterations of the last policy whose held-out answers are there."""
        return max((result.finished for result in self.view.results), default=0)

    def _list(self) -> None:
        """Fill the tables, where what is in them has changed."""
        complete = {view.number for view in self.view.iterations}
        shards = 0 if self.iteration is None else self._shards(self.iteration)
        state = (self.iteration, self.iteration in complete, shards, self.evaluated, len(self.view.results))
        if state == self._listed:
            return
        self._listed = state
        self._texts = {}
        self._fill("prompts", self._prompt_rows)
        self._fill("held-out", self._held_out_rows)

    def _shards(self, iteration: int) -> int:
        return len(self.reader.folder.iteration(iteration).shards.paths())

    def _fill(self, name: str, rows: Callable[[], Iterable[tuple[str, str, list[str]]]]) -> None:
        table = self._table(name)
        table.clear()
        try:
            for key, text, cells in rows():
                self._texts[f"{name}/{key}"] = text
                table.add_row(*map(cell, [*cells, text]), key=key)
        except UserError as error:
            self.notify(for_terminal(str(error)), severity="warning", markup=False)

    def _prompt_rows(self) -> Iterable[tuple[str, str, list[str]]]:
        if self.iteration is None:
            self._write("prompts-caption", ["no iteration has begun"])
            return
        rows = prompts_of(self.reader.folder, self.iteration)
        self._write(
            "prompts-caption",
            [f"iteration {self.iteration}: {len(rows)} prompts, the most difficult first; Enter opens one"],
        )
        for row in rows:
            rewards = " ".join(number(reward) for reward in row.rewards)
            text = f"({row.prompt_id}: its text was deleted)" if row.text is None else row.text
            yield row.prompt_id, text, [number(row.difficulty), "yes" if row.selected else "", rewards]

    def _held_out_rows(self) -> Iterable[tuple[str, str, list[str]]]:
        for row in held_out_prompts(self.reader.folder, self.evaluated):
            yield row.prompt_id, row.text, [number(row.before), number(row.after)]

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Open a prompt."""
        key = str(event.row_key.value)
        held_out = event.data_table.id == "held-out-table"
        folder = self.reader.folder
        try:
            if held_out:
                rows = held_out_answers(folder, self.evaluated, key)
            else:
                assert self.iteration is not None
                rows = responses_to(folder, self.iteration, key)
        except UserError as error:
            self.notify(for_terminal(str(error)), severity="warning", markup=False)
            return
        self.push_screen(Responses(self._texts[f"{'held-out' if held_out else 'prompts'}/{key}"], rows))

    def action_show(self, name: str) -> None:
        """Show a part of the screen."""
        self.query_one(TabbedContent).active = name
        if name != "overview":
            self._table(name).focus()

    def action_iteration(self, by: int) -> None:
        """Show the prompts of the iteration before, or after."""
        numbers = sorted(self.reader.folder.iteration_numbers())
        if self.iteration is not None:
            place = numbers.index(self.iteration) + by
            self._iteration = numbers[max(0, min(place, len(numbers) - 1))]
            self._list()
