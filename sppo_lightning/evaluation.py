"""Held-out evaluation: stored, scored, greedy answers, and what is measured on them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_lightning.collect import Collector
from sppo_lightning.rollouts import ShardStore, read_rollouts, write_atomically, write_rollouts
from sppo_lightning.types import EncodedPrompt, Rollout, UserError


class EvaluationBatch(NamedTuple):
    """Measurements of held-out answers, one value an answer."""

    reward: Tensor  # [P] float32, NaN where scoring failed
    win: Tensor  # [P] float32, 1 above the initial policy's reward, 0.5 equal, 0 below; NaN without one
    length: Tensor  # [P] float32, tokens
    failed: Tensor  # [P] float32, 1 where the reward is non-finite


def ensure_evaluation(
    folder: Path,
    prompts: Sequence[EncodedPrompt],
    collector: Collector,
    *,
    iteration: int,
    policy_fingerprint: str,
) -> list[Rollout]:
    """Answer and score held-out prompts greedily, once a policy; return the stored rows.

    Args:
        folder: where ``rollouts.parquet`` and ``manifest.json`` go.
        prompts: held-out prompts.
        collector: samples and scores.
        iteration: finished self-play iterations, for the progress display.
        policy_fingerprint: of the policy that answers; answers of another policy are made anew.
    """
    final, manifest = folder / "rollouts.parquet", folder / "manifest.json"
    ids = [prompt.prompt.id for prompt in prompts]
    made_by = {"policy_fingerprint": policy_fingerprint, "prompts": ids}
    if final.exists() and manifest.exists() and json.loads(manifest.read_bytes()) == made_by:
        return read_rollouts(final)
    ranks = collector.ranks
    parts = folder / f"parts-{policy_fingerprint[:12]}"
    rows = collector.collect_greedy(
        ShardStore(parts), "greedy", prompts, iteration=iteration, phase="evaluating"
    )
    ranks.barrier("evaluation read")
    if ranks.rank == 0:
        write_rollouts(final, rows)
        write_atomically(manifest, json.dumps(made_by).encode())
        shutil.rmtree(parts)
    ranks.barrier("evaluation written")
    return rows


def load_evaluation(folder: Path) -> list[Rollout] | None:
    """Return stored answers, or ``None`` if there are none."""
    final = folder / "rollouts.parquet"
    return read_rollouts(final) if final.exists() else None


def measure(rows: Sequence[Rollout], baseline: Sequence[Rollout] | None) -> EvaluationBatch:
    """Return the measurements of ``rows`` against the initial policy's answers to the same prompts.

    Raises:
        UserError: if no answer has a finite reward.
    """
    rewards = [row.reward if row.reward is not None else float("nan") for row in rows]
    if not any(math.isfinite(reward) for reward in rewards):
        raise UserError("no held-out answer has a finite reward: check data.reward on data.eval_prompts")
    initial = {row.prompt_id: row.reward for row in baseline or ()}
    wins = [_win(reward, initial.get(row.prompt_id)) for row, reward in zip(rows, rewards, strict=True)]
    return EvaluationBatch(
        reward=torch.tensor(rewards, dtype=torch.float32),
        win=torch.tensor(wins, dtype=torch.float32),
        length=torch.tensor([float(len(row.token_ids)) for row in rows]),
        failed=torch.tensor([0.0 if math.isfinite(reward) else 1.0 for reward in rewards]),
    )


def _win(reward: float, initial: float | None) -> float:
    if initial is None or not math.isfinite(initial) or not math.isfinite(reward):
        return float("nan")
    return 1.0 if reward > initial else 0.5 if reward == initial else 0.0


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
