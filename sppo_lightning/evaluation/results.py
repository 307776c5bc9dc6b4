"""What a run reached on its held-out prompts, one row for each evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from sppo_lightning.evaluation.measures import PairedDifference, mean_with_error, measure, paired_difference
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Rollout


class HeldOutResult(NamedTuple):
    """Greedy answers to ``eval_prompts`` after some iterations; ``nan`` where nothing can be compared."""

    finished: int  # self-play iterations; 0: the initial policy
    reward: float  # mean
    stderr: float  # of the mean
    gain: PairedDifference  # over the initial policy, prompt by prompt
    win_rate: float  # against the initial policy's answers, in [0, 1]; ties count half
    tokens: float  # mean length of an answer

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row in words and numbers: policy, reward, gain, win rate, tokens."""
        initial = self.finished == 0
        return (
            "initial policy" if initial else f"{self.finished} iteration(s)",
            f"{self.reward:.3f}{_error(self.stderr)}",
            "" if initial else f"{self.gain.mean:+.3f}{_error(self.gain.stderr)}",
            "" if initial else f"{self.win_rate:.1%}",
            "" if math.isnan(self.tokens) else f"{self.tokens:.1f}",
        )


def _error(stderr: float) -> str:
    return "" if math.isnan(stderr) else f" ± {stderr:.3f}"  # one answer has none


HEADINGS = ("after", "reward", "gain over initial", "win rate", "tokens")
"""Of :attr:`HeldOutResult.cells`."""


def held_out_results(folder: RunFolder, iterations: int) -> list[HeldOutResult]:
    """Return what was measured on ``eval_prompts``; empty if the initial policy was not.

    Args:
        folder: the run.
        iterations: the last one that counts.
    """
    initial = load_evaluation(folder.evaluation("000"))
    return [] if initial is None else list(_measured(folder, iterations, initial))


def _measured(folder: RunFolder, iterations: int, initial: list[Rollout]) -> Iterator[HeldOutResult]:
    for finished in range(iterations + 1):
        rows = initial if finished == 0 else load_evaluation(folder.evaluation(f"{finished:03d}"))
        if rows is None:
            continue
        batch = measure(rows, initial)
        mean, stderr, _ = mean_with_error(batch.reward).tolist()
        gain = paired_difference(rows, initial)
        yield HeldOutResult(
            finished, mean, stderr, gain, float(batch.win.nanmean()), float(batch.length.nanmean())
        )
