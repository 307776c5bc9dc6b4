"""Tables of statistics as a rule sees them, made of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sppo_lightning.difficulty import ProbeResponses, StatisticsTable, estimate_difficulty, reward_statistics
from sppo_lightning.difficulty import empty_difficulty_table as no_table


def probe_table(
    rewards: Mapping[str, Sequence[float]], *, iteration: int = 0, **metadata: Sequence[Any]
) -> StatisticsTable:
    """Return the table after a probe with these rewards; ``metadata``: what the prompt file says, row by row."""
    known = estimate_difficulty(reward_statistics(rewards), no_table(), iteration=iteration, smoothing=0.0)
    return with_responses(known, rewards, **metadata)


def with_responses(
    table: StatisticsTable, rewards: Mapping[str, Sequence[float]], **metadata: Sequence[Any]
) -> StatisticsTable:
    """Return a table with what may be asked of it; a prompt without ``rewards`` was not probed."""
    counts = torch.tensor([0, *(len(rewards.get(name, ())) for name in table.prompt_ids)])
    flat = [value for name in table.prompt_ids for value in rewards.get(name, ())]
    responses = ProbeResponses(
        torch.tensor(flat, dtype=torch.float64),
        torch.ones(len(flat), dtype=torch.int32),
        torch.zeros(len(flat), dtype=torch.int8),
        counts.cumsum(0),
    )
    return StatisticsTable(
        table.prompt_ids,
        table.columns,
        read_responses=lambda: responses,
        read_metadata=lambda name: tuple(metadata[name]),
    )


def shuffled(table: StatisticsTable, seed: int) -> StatisticsTable:
    """Return the rows in another order, with all that may be asked of them."""
    generator = torch.Generator().manual_seed(seed)
    return table.taken(torch.randperm(len(table), generator=generator))


def pair_table(prompt_ids: Sequence[str], **columns: Sequence[float]) -> StatisticsTable:
    """Return a table of pairs."""
    return StatisticsTable(
        tuple(prompt_ids),
        {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()},
    )
