"""The held-out rewards of a study's runs, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sppo_lightning.evaluation.gate import read_decisions
from sppo_lightning.evaluation.held_out import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.types import Rollout, UserError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """The held-out answers after some iterations. Shapes: P held-out prompts."""

    finished: int  # self-play iterations
    rewards: Numbers  # [P]; NaN: no finite reward
    lengths: Numbers  # [P], tokens
    tokens: int  # sampled by the run until then, held-out answers not counted


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        run: which one.
        prompt_ids: of the held-out prompts, in order.
        evaluations: in order; the first is of the initial policy.
        final: index of the evaluation of the policy that the run ended with.
        pairs: trained on in each iteration, repeated ones not counted.
        reverted: iterations that the gate gave up.
    """

    run: PlannedRun
    prompt_ids: tuple[str, ...]
    evaluations: tuple[Evaluated, ...]
    final: int
    pairs: tuple[int, ...]
    reverted: int

    @property
    def gain(self) -> Numbers:
        """[P]: held-out reward of the final policy less that of the initial one."""
        found: Numbers = self.evaluations[self.final].rewards - self.evaluations[0].rewards
        return found

    @property
    def lowest_gain(self) -> float:
        """The lowest mean gain after any iteration, reverted ones included."""
        first = self.evaluations[0].rewards
        return min(float(np.nanmean(each.rewards - first)) for each in self.evaluations[1:])

    @property
    def win_rate(self) -> float:
        """Share of prompts where the final answer is better than the initial one, ties half."""
        gain = self.gain[np.isfinite(self.gain)]
        return float(np.mean((gain > 0) + 0.5 * (gain == 0)))

    @property
    def length_ratio(self) -> float:
        """Mean length of the final answers over that of the initial ones."""
        lengths = [self.evaluations[place].lengths.mean() for place in (self.final, 0)]
        return float(lengths[0] / lengths[1])

    @property
    def tokens(self) -> int:
        """Tokens that the run sampled."""
        return self.evaluations[-1].tokens

    def gain_at(self, tokens: float) -> Numbers:
        """[P]: gain once so many tokens were sampled, between two evaluations on the line that joins them."""
        known = np.array([each.tokens for each in self.evaluations], dtype=np.float64)
        rewards = np.stack([each.rewards for each in self.evaluations])
        place = int(np.clip(np.searchsorted(known, tokens, side="right") - 1, 0, len(known) - 2))
        width = known[place + 1] - known[place]
        share = float(np.clip((tokens - known[place]) / width, 0.0, 1.0)) if width > 0 else 1.0
        found: Numbers = (1 - share) * rewards[place] + share * rewards[place + 1] - rewards[0]
        return found


def read_outcome(run: PlannedRun) -> Outcome:
    """Read what a run that has ended came to.

    Raises:
        UserError: if its evaluations are not there.
    """
    folder = RunFolder(run.folder)
    iterations = int(run.config["data"]["iterations"])
    found, pairs, tokens = [], [], 0
    order: list[str] = []
    for finished in range(iterations + 1):
        rows = load_evaluation(folder.evaluation(f"{finished:03d}"))
        if rows is None:
            raise UserError(
                f"{run.name}: {folder.evaluation(f'{finished:03d}')} is missing or damaged: delete the run's file in "
                "the study's state folder and its run folder, and start the study again"
            )
        if finished > 0:
            store = folder.iteration(finished - 1)
            tokens += sum(sum(row.length for row in store.shards.stream(name)) for name in ("probe", "topup"))
            pairs.append(int((store.read_manifest() or {})["counts"]["pairs"]))
        order = order or [row.prompt_id for row in rows]
        found.append(_evaluated(finished, rows, order, tokens))
    decisions = read_decisions(folder)
    return Outcome(
        run,
        tuple(order),
        tuple(found),
        decisions[-1].policy if decisions else iterations,
        tuple(pairs),
        sum(item.action == "revert" for item in decisions),
    )


def _evaluated(finished: int, rows: Sequence[Rollout], order: Sequence[str], tokens: int) -> Evaluated:
    by_id = {row.prompt_id: row for row in rows}
    here = [by_id[key] for key in order]
    rewards = [np.nan if row.reward is None else row.reward for row in here]
    return Evaluated(
        finished,
        np.array(rewards, dtype=np.float64),
        np.array([len(row.token_ids) for row in here], dtype=np.float64),
        tokens,
    )


def prompt_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """Return one row for each run, evaluation and held-out prompt."""
    rows = [
        {
            **{"setting": item.run.setting, "seed": item.run.seed, "arm": item.run.arm},
            **{"finished": each.finished, "prompt_id": key, "reward": float(reward), "tokens": int(length)},
        }
        for item in outcomes
        for each in item.evaluations
        for key, reward, length in zip(item.prompt_ids, each.rewards, each.lengths, strict=True)
    ]
    return pa.Table.from_pylist(rows)
