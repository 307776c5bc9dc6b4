"""What is measured on held-out answers, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.evaluation.win_rate import reward_preferences
from sppo_lightning.types import Rollout, UserError


class EvaluationBatch(NamedTuple):
    """Measurements of held-out answers, one value an answer."""

    reward: Tensor  # [P] float32, NaN where scoring failed
    win: Tensor  # [P] float32, 1 above the initial policy's reward, 0.5 equal, 0 below; NaN without one
    length: Tensor  # [P] float32, tokens
    failed: Tensor  # [P] float32, 1 where the reward is non-finite


def measure(rows: Sequence[Rollout], baseline: Sequence[Rollout] | None) -> EvaluationBatch:
    """Return the measurements of ``rows`` against the initial policy's answers to the same prompts.

    Raises:
        UserError: if no answer has a finite reward.
    """
    rewards = [row.reward if row.reward is not None else float("nan") for row in rows]
    if not any(math.isfinite(reward) for reward in rewards):
        raise UserError("no held-out answer has a finite reward: check data.reward on data.eval_prompts")
    initial = {row.prompt_id: row.reward for row in baseline or ()}
    wins = reward_preferences(rewards, [initial.get(row.prompt_id) for row in rows])
    return EvaluationBatch(
        reward=torch.tensor(rewards, dtype=torch.float32),
        win=torch.tensor(wins, dtype=torch.float32),
        length=torch.tensor(
            [float(len(row.token_ids)) if row.finish_reason != "failed" else math.nan for row in rows]
        ),
        failed=torch.tensor([0.0 if math.isfinite(reward) else 1.0 for reward in rewards]),
    )


def mean_with_error(values: Tensor) -> Tensor:
    """Return ``[3]``: mean, standard error and count of the finite ``values``.

    The standard error is the sample standard deviation over the root of the count; NaN below two values.
    """
    values = values[values.isfinite()].to(torch.float32 if values.device.type == "mps" else torch.float64)
    count = torch.tensor(float(len(values)), dtype=values.dtype, device=values.device)
    error = values.std() / count.sqrt() if len(values) > 1 else count.new_tensor(float("nan"))
    return torch.stack([values.mean(), error, count])


class PairedDifference(NamedTuple):
    """Mean reward over the same prompts, less the baseline's."""

    mean: float
    stderr: float  # of the mean of the per-prompt differences
    prompts: int


def paired_difference(rows: Sequence[Rollout], baseline: Sequence[Rollout]) -> PairedDifference:
    """Compare two evaluations prompt by prompt; prompts without two finite rewards are left out."""
    initial = {row.prompt_id: row.reward for row in baseline}
    differences = torch.tensor(
        [
            row.reward - before
            for row in rows
            if row.reward is not None and (before := initial.get(row.prompt_id)) is not None
        ],
        dtype=torch.float64,
    )
    differences = differences[differences.isfinite()]
    count = len(differences)
    stderr = float(differences.std()) / math.sqrt(count) if count > 1 else float("nan")
    return PairedDifference(float(differences.mean()) if count else float("nan"), stderr, count)
