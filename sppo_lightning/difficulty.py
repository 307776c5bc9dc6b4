"""Prompt difficulty: the mean reward of a prompt's on-policy responses. A low mean is a difficult prompt.

``D(x) = (1/N) sum_j r(x, y_j)``, y_j sampled from the policy (arXiv 2510.05534).
Shapes: P prompts.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.types import FINISH_REASONS, FinishReason, UserError

REWARD_COLUMNS = ("mean_reward", "std_reward", "min_reward", "max_reward", "samples")
DIFFICULTY_COLUMNS = ("difficulty", "estimated_iteration", *REWARD_COLUMNS)
"""Columns of the table that ``data.selection`` sees."""


@dataclass(frozen=True, eq=False)
class ProbeResponses:
    """The usable responses of an iteration's probe, prompt after prompt, in the order of ``sample_index``.

    Shapes: R responses to P prompts. A prompt that is not probed in this iteration has none.

    Args:
        rewards: ``[R]`` float64.
        lengths: ``[R]`` int32, tokens.
        finish_codes: ``[R]`` int8, places in :data:`~sppo_lightning.types.FINISH_REASONS`.
        starts: ``[P + 1]`` int64; the responses to prompt p are those from ``starts[p]`` to ``starts[p + 1]``.
    """

    rewards: Tensor
    lengths: Tensor
    finish_codes: Tensor
    starts: Tensor

    def of(self, row: int) -> slice:
        """Return where the responses to the prompt of a table's row lie."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    @property
    def rows(self) -> Tensor:
        """The table's row of each response's prompt, ``[R]`` int64."""
        counts = self.starts.diff()
        return torch.arange(len(counts)).repeat_interleave(counts)

    def taken(self, rows: Tensor) -> ProbeResponses:
        """Return the responses to the prompts of some rows, ``[rows]`` int64, in that order."""
        counts = self.starts.diff()[rows]
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (self.starts[rows] - starts[:-1]).repeat_interleave(counts)
        places = shift + torch.arange(int(starts[-1]))
        return ProbeResponses(self.rewards[places], self.lengths[places], self.finish_codes[places], starts)

    def ended_by(self, reason: FinishReason) -> Tensor:
        """Return where a response ended for ``reason``, ``[R]`` bool."""
        return self.finish_codes == FINISH_REASONS.index(reason)


def _not_here() -> Any:
    raise UserError(
        "only the table of data.selection has responses and history: name what a rule reads in its `requires`, and it "
        "is refused at the start where that is missing"
    )


def _no_metadata(name: str) -> Any:
    raise UserError(
        f"this table has no {name!r} of the prompts: name what a rule reads of them in its `prompt_fields`"
    )


@dataclass(frozen=True)
class StatisticsTable:
    """Named columns with one row a prompt, or a pair; the table of ``data.selection`` has more to ask for.

    Args:
        prompt_ids: of the rows.
        columns: ``[P]`` float64 each.
        read_responses: reads :attr:`responses`.
        read_history: reads :attr:`history`.
        read_metadata: reads :meth:`metadata`.
    """

    prompt_ids: tuple[str, ...]
    columns: Mapping[str, Tensor]
    read_responses: Callable[[], ProbeResponses] = field(default=_not_here, repr=False, compare=False)
    read_history: Callable[[], tuple[StatisticsTable, ...]] = field(
        default=_not_here, repr=False, compare=False
    )
    read_metadata: Callable[[str], tuple[Any, ...]] = field(default=_no_metadata, repr=False, compare=False)

    @property
    def responses(self) -> ProbeResponses:
        """The probe's usable responses, read from disk when first asked for."""
        return self.read_responses()

    @property
    def history(self) -> tuple[StatisticsTable, ...]:
        """What each earlier iteration knew of these prompts, read from disk when first asked for.

        Tables with these rows, :data:`DIFFICULTY_COLUMNS` and ``selected`` (1 or 0); NaN where a prompt was not known.
        """
        return self.read_history()

    def metadata(self, name: str) -> tuple[Any, ...]:
        """Return what the prompt file says of each row's prompt under ``name``, read when first asked for."""
        return self.read_metadata(name)

    def __post_init__(self) -> None:
        assert all(len(column) == len(self.prompt_ids) for column in self.columns.values())

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def state(self) -> dict[str, Any]:
        """Return the table as plain containers and tensors, for a checkpoint."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "columns": {name: column.clone() for name, column in self.columns.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StatisticsTable:
        """Return the table that :meth:`state` came from."""
        return cls(tuple(state["prompt_ids"]), state["columns"])

    def rows(self, prompt_ids: Sequence[str]) -> StatisticsTable:
        """Return the rows of ``prompt_ids``, in that order."""
        position = {prompt_id: row for row, prompt_id in enumerate(self.prompt_ids)}
        index = torch.tensor([position[prompt_id] for prompt_id in prompt_ids], dtype=torch.long)
        return StatisticsTable(
            tuple(prompt_ids), {name: column[index] for name, column in self.columns.items()}
        )

    def taken(self, rows: Tensor) -> StatisticsTable:
        """Return some rows by their numbers, ``[rows]`` int64, in that order, with all that may be asked of them."""
        places = rows.tolist()

        def metadata(name: str) -> tuple[Any, ...]:
            values = self.metadata(name)
            return tuple(values[row] for row in places)

        return StatisticsTable(
            tuple(self.prompt_ids[row] for row in places),
            {name: column[rows] for name, column in self.columns.items()},
            read_responses=lambda: self.responses.taken(rows),
            read_history=lambda: tuple(earlier.taken(rows) for earlier in self.history),
            read_metadata=metadata,
        )

    def aligned(self, prompt_ids: tuple[str, ...]) -> StatisticsTable:
        """Return the rows of ``prompt_ids``, in that order; NaN where this table lacks one."""
        position = {prompt_id: row for row, prompt_id in enumerate(self.prompt_ids)}
        index = torch.tensor(
            [position.get(prompt_id, len(self)) for prompt_id in prompt_ids], dtype=torch.long
        )
        return StatisticsTable(
            prompt_ids,
            {
                name: torch.cat([column, column.new_tensor([math.nan])])[index]
                for name, column in self.columns.items()
            },
        )

    def updated(self, newer: StatisticsTable) -> StatisticsTable:
        """Return this table with the rows of ``newer`` put in place of, or after, its own."""
        replaced = set(newer.prompt_ids)
        kept = [prompt_id for prompt_id in self.prompt_ids if prompt_id not in replaced]
        old = self.rows(kept)
        return StatisticsTable(
            (*old.prompt_ids, *newer.prompt_ids),
            {name: torch.cat([old[name], newer[name]]) for name in newer.columns},
        )


def empty_difficulty_table() -> StatisticsTable:
    """Return a difficulty table without rows."""
    return StatisticsTable((), {name: torch.zeros(0, dtype=torch.float64) for name in DIFFICULTY_COLUMNS})


def reward_statistics(rewards: Mapping[str, Sequence[float]]) -> StatisticsTable:
    """Summarise the finite rewards of each prompt.

    Args:
        rewards: prompt id to its rewards, at least one each, all finite.

    Returns:
        The :data:`REWARD_COLUMNS`; the standard deviation is the population's (0 for one sample).
    """
    columns: dict[str, array[float]] = {name: array("d") for name in REWARD_COLUMNS}
    for values in rewards.values():
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        row = (mean, math.sqrt(variance), min(values), max(values), float(len(values)))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return StatisticsTable(
        tuple(rewards), {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    )


def estimate_difficulty(
    statistics: StatisticsTable, previous: StatisticsTable, *, iteration: int, smoothing: float
) -> StatisticsTable:
    """Turn this iteration's reward statistics into difficulties, smoothed with the previous estimates.

    ``difficulty = smoothing * previous + (1 - smoothing) * mean_reward``; without a previous estimate it is
    the mean reward.

    Args:
        statistics: rewards of this iteration's samples.
        previous: difficulty table of the iteration before; prompts that it lacks are new.
        iteration: self-play iteration that the samples come from.
        smoothing: weight of the previous estimate, in [0, 1).
    """
    mean = statistics["mean_reward"]
    known = dict(zip(previous.prompt_ids, previous["difficulty"].tolist(), strict=True))
    old = torch.tensor(
        [known.get(key, float("nan")) for key in statistics.prompt_ids], dtype=torch.float64
    ).reshape(mean.shape)
    difficulty = torch.where(old.isnan(), mean, smoothing * old + (1 - smoothing) * mean)
    return StatisticsTable(
        statistics.prompt_ids,
        {
            "difficulty": difficulty,
            "estimated_iteration": torch.full_like(mean, float(iteration)),
            **statistics.columns,
        },
    )


def moved_with_policy(previous: StatisticsTable, newer: StatisticsTable) -> StatisticsTable:
    """Return earlier estimates, moved by the mean change of the prompts that were estimated again.

    The policy has changed since. Where only some prompts are estimated again, the others' estimates would be compared
    with theirs as they are, and the rank of a prompt would tell how long ago it was estimated. Meant for a random share
    of all prompts: the mean change of others is not that of all.

    Args:
        previous: estimates so far.
        newer: estimates of this iteration; prompts that ``previous`` lacks tell nothing.
    """
    known = set(previous.prompt_ids)
    again = [prompt_id for prompt_id in newer.prompt_ids if prompt_id in known]
    if not again:
        return previous
    change = (newer.rows(again)["difficulty"] - previous.rows(again)["difficulty"]).mean()
    return StatisticsTable(
        previous.prompt_ids, {**previous.columns, "difficulty": previous["difficulty"] + change}
    )


@dataclass(frozen=True)
class Reestimation:
    """Which prompts to probe again at the start of the next iteration, and how to merge the estimates."""

    prompt_ids: tuple[str, ...]
    samples: int  # responses for each prompt
    smoothing: float  # weight of the old estimate, in [0, 1)
    at_random: bool = False  # whether they are a random share of all prompts that have an estimate
