"""The held-out rewards of a study's runs, prompt by prompt."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sppo_lightning.evaluation.gate import read_decisions
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.types import Rollout, UserError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """The held-out answers after some iterations. Shapes: P held-out prompts."""

    finished: int  # self-play iterations
    rewards: Numbers  # [P]; NaN: no finite reward
    lengths: Numbers  # [P], tokens; NaN: no answer
    tokens: int  # sampled by the run until then, held-out answers not counted


@dataclass(frozen=True)
class InitialResponses:
    """The responses of the policy that a run started from, held-out answers not counted. Shapes: R responses.

    Args:
        source: equal in runs that sample the same responses: policy, engine, setting and seed.
        keys: [R], of prompt and sample index.
        tokens: [R]
    """

    source: str = ""
    keys: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        run: which one.
        prompt_ids: of the held-out prompts, in order.
        evaluations: in order; the first is of the initial policy.
        held: after each number of iterations, the index of the evaluation of the policy that the run then had: an
            earlier one's where the gate reverted.
        pairs: trained on in each iteration, repeated ones not counted.
        reverted: iterations that the gate gave up.
        initial: its first iteration's responses.
    """

    run: PlannedRun
    prompt_ids: tuple[str, ...]
    evaluations: tuple[Evaluated, ...]
    held: tuple[int, ...]
    pairs: tuple[int, ...]
    reverted: int
    initial: InitialResponses = field(default_factory=InitialResponses)

    @property
    def final(self) -> Evaluated:
        """The evaluation of the policy that the run ended with."""
        return self.evaluations[self.held[-1]]

    @property
    def gain(self) -> Numbers:
        """[P]: held-out reward of the final policy less that of the initial one."""
        found: Numbers = self.final.rewards - self.evaluations[0].rewards
        return found

    @property
    def lowest_gain(self) -> float:
        """The lowest mean gain after any iteration, reverted ones included."""
        first = self.evaluations[0].rewards
        return min(mean_of_known(each.rewards - first) for each in self.evaluations[1:])

    @property
    def win_rate(self) -> float:
        """Share of prompts where the final answer is better than the initial one, ties half."""
        gain = self.gain[np.isfinite(self.gain)]
        return mean_of_known((gain > 0) + 0.5 * (gain == 0))

    @property
    def length_ratio(self) -> float:
        """Mean length of the final answers over that of the initial ones."""
        return mean_of_known(self.final.lengths) / mean_of_known(self.evaluations[0].lengths)

    @property
    def tokens(self) -> int:
        """Tokens that the run sampled."""
        return self.evaluations[-1].tokens

    def gain_at(self, tokens: float) -> Numbers:
        """[P]: gain once so many tokens were sampled, between two evaluations on the line that joins them."""
        known = np.array([each.tokens for each in self.evaluations], dtype=np.float64)
        rewards = [self.evaluations[place].rewards for place in self.held]
        place = int(np.clip(np.searchsorted(known, tokens, side="right") - 1, 0, len(known) - 1))
        found: Numbers = rewards[place] - rewards[0]
        if place + 1 < len(known) and tokens > known[place]:
            share = (tokens - known[place]) / (known[place + 1] - known[place])
            found = found + share * (rewards[place + 1] - rewards[place])
        return found


def mean_of_known(values: Numbers) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def read_outcome(run: PlannedRun) -> Outcome:
    """Read what a run that has ended came to.

    Raises:
        UserError: if its evaluations are not there.
    """
    folder = RunFolder(run.folder)
    decisions = {item.finished: item for item in read_decisions(folder)}
    stopped = (number for number, item in decisions.items() if item.action == "stop")
    iterations = next(stopped, int(run.config["data"]["iterations"]))
    found, pairs, tokens = [], [], 0
    initial = InitialResponses()
    order: list[str] = []
    for finished in range(iterations + 1):
        rows = load_evaluation(folder.evaluation(f"{finished:03d}"))
        if rows is None:
            raise UserError(f"{folder.evaluation(f'{finished:03d}')} is missing or damaged")
        if finished > 0:
            store = folder.iteration(finished - 1)
            manifest = store.read_manifest()
            if manifest is None:
                raise UserError(f"{store.manifest_path} is missing")
            here = _responses(run, manifest, store.shards)
            initial = here if finished == 1 else initial
            tokens += int(here.tokens.sum())
            pairs.append(int(manifest["counts"]["pairs"]))
        order = order or [row.prompt_id for row in rows]
        found.append(_evaluated(finished, rows, order, tokens))
    return Outcome(
        run,
        tuple(order),
        tuple(found),
        tuple(
            decisions[number].policy if number in decisions else number for number in range(iterations + 1)
        ),
        tuple(pairs),
        sum(item.action == "revert" for item in decisions.values()),
        initial,
    )


def _responses(run: PlannedRun, manifest: Mapping[str, Any], shards: ShardStore) -> InitialResponses:
    """Return an iteration's responses."""
    keys, tokens = array("q"), array("q")
    for name in ("probe", "topup"):
        for row in shards.stream(name):
            keys.append(hash((row.prompt_id, row.sample_index)))
            tokens.append(row.length)
    source = [run.setting, run.seed, manifest.get("policy_fingerprint"), manifest.get("generator")]
    return InitialResponses(json.dumps(source), np.array(keys, np.int64), np.array(tokens, np.int64))


def shared_tokens(outcomes: Sequence[Outcome]) -> int:
    """Return how many tokens runs took from the responses of another one, instead of sampling them again."""
    by_source: dict[str, list[InitialResponses]] = {}
    for item in outcomes:
        by_source.setdefault(item.initial.source, []).append(item.initial)
    shared = 0
    for responses in by_source.values():
        tokens = np.concatenate([each.tokens for each in responses])
        _, sampled = np.unique(np.concatenate([each.keys for each in responses]), return_index=True)
        shared += int(tokens.sum() - tokens[sampled].sum())
    return shared


def _evaluated(finished: int, rows: Sequence[Rollout], order: Sequence[str], tokens: int) -> Evaluated:
    by_id = {row.prompt_id: row for row in rows}
    here = [by_id[key] for key in order]
    rewards = np.array([np.nan if row.reward is None else row.reward for row in here], dtype=np.float64)
    lengths = [np.nan if row.finish_reason == "failed" else len(row.token_ids) for row in here]
    return Evaluated(
        finished,
        np.where(np.isfinite(rewards), rewards, np.nan),
        np.array(lengths, dtype=np.float64),
        tokens,
    )


def prompt_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """Return one row for each run, evaluation and held-out prompt."""
    rows = [
        {
            **{"setting": item.run.setting, "seed": item.run.seed, "arm": item.run.arm},
            **{"finished": each.finished, "prompt_id": key, "reward": float(reward), "tokens": float(length)},
        }
        for item in outcomes
        for each in item.evaluations
        for key, reward, length in zip(item.prompt_ids, each.rewards, each.lengths, strict=True)
    ]
    return pa.Table.from_pylist(rows)
