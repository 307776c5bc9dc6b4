"""Selections made of other selections, for both tables. Shapes: P prompts, or pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.seeding import distinct, random_keys
from sppo_lightning.selection.contract import Selection
from sppo_lightning.selection.shares import mask_of


class Wrapper(Selection):
    """Hands on to other selections all but the question itself; their states are nested in its own."""

    _parts: Mapping[str, Selection]

    def _wrap(self, parts: Mapping[str, Selection], prompt_fields: tuple[str, ...] = ()) -> None:
        """Take the selections by the name that each has in states and metrics."""
        self._parts = parts
        rules = parts.values()
        self.requires = tuple(dict.fromkeys(name for rule in rules for name in rule.requires))
        fields = (name for rule in rules for name in rule.prompt_fields)
        self.prompt_fields = tuple(dict.fromkeys([*prompt_fields, *fields]))

    def setup(self, prompts: StatisticsTable) -> None:
        """Hand on the prompts."""
        for rule in self._parts.values():
            rule.setup(prompts)

    def observe(self, table: StatisticsTable, *, iteration: int) -> None:
        """Hand on the whole table."""
        for rule in self._parts.values():
            rule.observe(table, iteration=iteration)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the selections, under their names."""
        return {
            f"{part}/{name}": value
            for part, rule in self._parts.items()
            for name, value in rule.metrics().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the selections, by name."""
        return {part: rule.state_dict() for part, rule in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand on the states."""
        for part, rule in self._parts.items():
            rule.load_state_dict(state[part])


class AllOf(Wrapper):
    """The rows that every one of several selections keeps; each of them sees all rows.

    Args:
        selections: at least one.
    """

    def __init__(self, selections: list[Selection]) -> None:
        if not selections:
            raise ValueError("AllOf.selections=[] must hold at least one selection")
        self.selections = selections
        self._wrap({str(number): rule for number, rule in enumerate(selections)})

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the conjunction of the masks."""
        masks = [rule.select(table, iteration=iteration, seed=seed) for rule in self.selections]
        return torch.stack(masks).all(0)


class PerCategory(Wrapper):
    """A selection within each category by itself: with ``Easiest(0.3)`` the easiest 30 % of every category.

    Shares are rounded in each category: one with a single prompt gives none to a share below one half. A selection that
    keeps a state is asked once a category, in the order of their names.

    Args:
        selection: applied to the rows of each category.
        column: key of the prompt file that names a prompt's category.
    """

    def __init__(self, selection: Selection, column: str = "category") -> None:
        self.selection = selection
        self.column = column
        self._wrap({"selection": selection}, (column,))

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return what the selection keeps of each category."""
        categories: dict[str, list[int]] = {}
        for row, category in enumerate(table.metadata(self.column)):
            categories.setdefault(str(category), []).append(row)
        mask = torch.zeros(len(table), dtype=torch.bool)
        for _, numbers in sorted(categories.items()):
            rows = torch.tensor(numbers)
            mask[rows] = self.selection.select(table.taken(rows), iteration=iteration, seed=seed)
        return mask


class MatchedRandom(Wrapper):
    """As many random rows as another selection keeps: that selection's size-matched control.

    Args:
        selection: asked for the size.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._wrap({"selection": selection})

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        """Return the rows with the lowest random keys."""
        keep = int(self.selection.select(table, iteration=iteration, seed=seed).sum())
        keys = random_keys(distinct(table.prompt_ids), seed, iteration, "random")
        return mask_of(keys.argsort(stable=True)[:keep], len(table))

    def size(self, total: int, *, iteration: int) -> int | None:
        """Return the size of the other selection."""
        return self.selection.size(total, iteration=iteration)
