"""What is seen of a run, in words and lines of text; models' texts are made safe to show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from sppo_lightning.evaluation.gate import Decision
from sppo_lightning.evaluation.results import HEADINGS
from sppo_lightning.text import for_terminal
from sppo_lightning.watch.reading import RunView
from sppo_lightning.watch.texts import ResponseRow

QUIET = 300.0  # seconds without anything new, after which a run may have stopped
LONGEST_CELL = 160  # characters of a text in a table
BAR = 30  # characters
BARS = "▁▂▃▄▅▆▇█"


def status(view: RunView) -> str:
    """Return where a run stands, in one line."""
    now = view.progress
    if now is None:
        return "where it stands cannot be read, see below"
    if now.phase in ("finished", "stopped by the gate"):
        return f"{now.phase}: {now.done} of {view.planned} iterations"
    parts = [f"iteration {now.iteration} of {view.planned}", now.phase]
    if now.total is None:
        parts.append(f"{now.done} {now.unit}" if now.done else "")
    else:
        parts.append(f"{bar(now.done, now.total)} {now.done}/{now.total} {now.unit}")
    if view.age > QUIET:
        parts.append(f"nothing new for {duration(view.age)}: it may have stopped")
    elif view.seconds_left is not None:
        parts.append(f"about {duration(view.seconds_left)} left")
    return " · ".join(filter(None, parts))


def bar(done: int, total: int) -> str:
    """Return a bar of text."""
    filled = round(BAR * min(done / total, 1.0)) if total else 0
    return "█" * filled + "░" * (BAR - filled)


def duration(seconds: float) -> str:
    """Return a time span in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def caption(name: str, values: Sequence[float]) -> str:
    """Return what a curve cannot say: its last value, and its range."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{name}: nothing yet"
    return f"{name}: {finite[-1]:.4g} (from {min(finite):.4g} to {max(finite):.4g}, {len(finite)} values)"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return a curve as a line of text, the mean of neighbours where there are more values than ``width``."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = max(1, math.ceil(len(finite) / width))
    means = [sum(part) / len(part) for part in (finite[at : at + size] for at in range(0, len(finite), size))]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in means)


def iterations_table(view: RunView) -> Table:
    """Return a row for each iteration."""
    table = Table(box=None, padding=(0, 1), title="iterations", title_justify="left")
    for heading in ("k", "reward", "difficulty", "selected", "pairs", "gate", "dropped"):
        table.add_column(heading, justify="left" if heading in ("gate", "dropped") else "right")
    decided = {item.finished - 1: item for item in view.decisions}
    for row in view.iterations:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(row.dropped.items()))
        table.add_row(
            *(
                str(row.number),
                f"{row.reward:.3f}",
                f"{row.difficulty:.3f}",
                str(row.selected),
                str(row.pairs),
            ),
            cell(decided[row.number].action if row.number in decided else ""),
            cell(dropped or "none"),
        )
    return table


def results_table(view: RunView) -> Table:
    """Return a row for each held-out evaluation."""
    table = Table(box=None, padding=(0, 1), title="held-out", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for result in view.results:
        table.add_row(*result.cells)
    return table


def decisions_text(decisions: Sequence[Decision]) -> Iterator[str]:
    """Yield what was decided otherwise than to go on."""
    for item in decisions:
        if item.action != "accept":
            reasons = "; ".join(item.reasons)
            yield f"gate after {item.finished} iteration(s): {item.action}: {reasons} (best: {item.best})"


def cell(text: str) -> Text:
    """Return a text of anybody in one line."""
    line = " ".join(text.split())
    return Text(for_terminal(line if len(line) <= LONGEST_CELL else f"{line[:LONGEST_CELL]}…"))


def number(value: float | None) -> str:
    """Return a reward, or nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def responses_text(prompt: str, rows: Sequence[ResponseRow]) -> Text:
    """Return a prompt and its responses, as they are read from top to bottom."""
    shown = Text()
    shown.append(f"{for_terminal(prompt)}\n", "bold")
    for row in rows:
        facts = [
            row.mark,
            f"reward {number(row.reward) or 'none'}",
            f"{row.tokens} tokens",
            row.finish_reason,
        ]
        style = "green" if "chosen" in row.mark else "red" if "rejected" in row.mark else "cyan"
        shown.append(f"\n── {for_terminal(' · '.join(filter(None, facts)))}\n", style)
        shown.append(f"{for_terminal(row.text)}\n")
    if not rows:
        shown.append("\nno responses are stored")
    return shown
