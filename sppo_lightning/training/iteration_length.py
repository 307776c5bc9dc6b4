"""How many pairs and optimizer steps an iteration has."""

from __future__ import annotations

from typing import NamedTuple


class IterationLength(NamedTuple):
    """How much an iteration trains on, all ranks together."""

    pairs: int  # repeated ones included
    steps: int  # optimizer steps


def iteration_length(
    pairs: int, *, pairs_per_step: int, epochs: int = 1, steps: int | None = None
) -> IterationLength:
    """Return how much an iteration trains on.

    Args:
        pairs: that the iteration has.
        pairs_per_step: of one optimizer step.
        epochs: ``data.epochs_per_iteration``.
        steps: ``data.steps_per_iteration``, which stands in for epochs.
    """
    if steps is not None:
        return IterationLength(steps * pairs_per_step, steps)
    return IterationLength(epochs * pairs, epochs * -(-pairs // pairs_per_step))


def steps_taken(pairs_consumed: int, *, pairs: int, pairs_per_step: int) -> int:
    """Return the optimizer steps that an iteration's epochs took to consume so many pairs.

    Args:
        pairs_consumed: by all ranks together, since the iteration's start.
        pairs: that one epoch has.
        pairs_per_step: of one optimizer step.
    """
    epochs, rest = divmod(pairs_consumed, pairs)
    return epochs * -(-pairs // pairs_per_step) + -(-rest // pairs_per_step)
