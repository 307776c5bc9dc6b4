"""One self-play iteration's data: schedule, probe, select, top up, pair, reference.

Everything lands in the iteration's store as it comes; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sppo_lightning.batching import PairBatch, StepSlot, collate
from sppo_lightning.collect import Collector, Wanted, by_prompt
from sppo_lightning.difficulty import (
    DIFFICULTY_COLUMNS,
    Reestimation,
    StatisticsTable,
    estimate_difficulty,
    reward_statistics,
)
from sppo_lightning.losses import PairLogps
from sppo_lightning.pairing import PAIR_COLUMNS, Pairing, build_pairs, pair_statistics
from sppo_lightning.rollouts import IterationStore, describe
from sppo_lightning.selection import Schedule, Selection
from sppo_lightning.types import EncodedPrompt, PreferencePair, Rollout, UserError


class ReferencePolicy(Protocol):
    """The frozen reference of an iteration."""

    def reference_pass(self) -> AbstractContextManager[None]:
        """Hold the reference in memory while the context lasts."""

    def reference_logps(self, batch: PairBatch) -> PairLogps:
        """Return the reference's log-probs of a batch, ``[B]`` each, float64, nats, on the CPU."""


@dataclass(frozen=True)
class IterationRules:
    """The scientific settings of an iteration; see :class:`~sppo_lightning.datamodule.SelfPlayDataModule`."""

    iterations: int
    samples_per_prompt: int
    probe_samples: int
    pairs_per_step: int
    batch_size: int
    schedule: Schedule
    selection: Selection
    pairing: Pairing
    pair_selection: Selection
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"data.samples_per_prompt={self.samples_per_prompt}: a pair needs at least 2 responses"
            )
        for name in ("iterations", "probe_samples", "pairs_per_step", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        slots = (
            ("selection", self.selection, DIFFICULTY_COLUMNS),
            ("pair_selection", self.pair_selection, PAIR_COLUMNS),
        )
        for slot, rule, columns in slots:
            missing = [name for name in rule.requires if name not in columns]
            if missing:
                raise ValueError(
                    f"data.{slot}: {type(rule).__name__} needs the column {missing[0]!r}, which is not there; "
                    f"this slot has {', '.join(columns)}"
                )

    def expected_pairs(self, prompt_ids: Sequence[str], iteration: int) -> tuple[int, int]:
        """Return how many candidate prompts an iteration has, and the most pairs that it may get from them."""
        candidates = self.schedule.candidates(
            prompt_ids, iteration=iteration, iterations=self.iterations, seed=self.seed
        )
        size = len(candidates)
        for rule in (self.selection, self.pair_selection):
            kept = rule.size(size, iteration=iteration)
            size = size if kept is None else kept
        return len(candidates), size


@dataclass(frozen=True)
class IterationBuilder:
    """Builds one iteration's pairs in its store.

    Args:
        rules: the scientific settings.
        prompts: encoded prompts by id, in file order.
        too_long: prompts that were dropped before.
        collector: samples and scores.
        made_with: settings of the generator and the reward, for the manifest.
        reference: the frozen reference.
        pad_token_id: padding of the reference pass.
    """

    rules: IterationRules
    prompts: Mapping[str, EncodedPrompt]
    too_long: Sequence[str]
    collector: Collector
    made_with: Mapping[str, Any]
    reference: ReferencePolicy
    pad_token_id: int

    def build(
        self,
        store: IterationStore,
        *,
        iteration: int,
        previous: StatisticsTable,
        reestimation: Reestimation | None,
        policy_fingerprint: str,
    ) -> None:
        """Make the iteration's data, or finish it.

        Args:
            store: where it goes.
            iteration: self-play iteration.
            previous: difficulties known so far.
            reestimation: which of them to estimate again; ``None``: only the unknown ones.
            policy_fingerprint: of the weights that answer.

        Raises:
            UserError: if fewer pairs come out than one optimizer step needs.
        """
        rules = self.rules
        first = self.collector.ranks.rank == 0
        manifest = self._manifest(iteration, policy_fingerprint, reestimation)
        if first and store.read_manifest() is None:
            store.write_manifest({**manifest, "complete": False})
        dropped: Counter[str] = Counter({"too_long": len(self.too_long)})
        candidates = rules.schedule.candidates(
            list(self.prompts), iteration=iteration, iterations=rules.iterations, seed=rules.seed
        )
        dropped["not_scheduled"] = len(self.prompts) - len(candidates)

        probed = self._probe(store, candidates, iteration, previous, reestimation)
        table = difficulty_after(probed, previous, iteration=iteration, smoothing=manifest["smoothing"])
        known = set(table.prompt_ids)
        dropped["non_finite_reward"] = sum(prompt_id not in known for prompt_id in candidates)
        ranked = table.rows([prompt_id for prompt_id in candidates if prompt_id in known])
        keep = rules.selection.select(ranked, iteration=iteration, seed=rules.seed).tolist()
        selected = [prompt_id for prompt_id, kept in zip(ranked.prompt_ids, keep, strict=True) if kept]
        dropped["not_selected"] = len(ranked) - len(selected)
        if first:
            store.write_difficulty(table, set(selected))

        rollouts = self._top_up(store, selected, probed, iteration)
        result = build_pairs(
            rollouts,
            self.prompts,
            rules.pairing,
            samples_per_prompt=rules.samples_per_prompt,
            iteration=iteration,
            seed=rules.seed,
        )
        dropped.update(result.dropped)
        pairs = self._reference_pass(result.pairs, iteration)
        rewards = {prompt_id: finite_rewards(rows) for prompt_id, rows in rollouts.items()}
        difficulty = dict(zip(table.prompt_ids, table["difficulty"].tolist(), strict=True))
        statistics = pair_statistics(pairs, rewards, difficulty)
        keep = rules.pair_selection.select(statistics, iteration=iteration, seed=rules.seed).tolist()
        dropped["pair_not_selected"] = keep.count(False)
        pairs = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]

        counts = {"prompts": len(self.prompts) + len(self.too_long), "pairs": len(pairs)}
        counts |= {"probed": len(probed), "selected": len(selected)}
        dropped += Counter()  # forget the reasons that dropped nothing
        assert counts["prompts"] == counts["pairs"] + dropped.total()
        if len(pairs) < rules.pairs_per_step:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"
            raise UserError(
                f"iteration {iteration} has {len(pairs)} pairs, fewer than one optimizer step of "
                f"data.pairs_per_step={rules.pairs_per_step}; of {counts['prompts']} prompts were dropped: "
                f"{reasons}"
            )
        if first:
            store.write_pairs(pairs)
            store.write_manifest(
                {
                    **manifest,
                    "complete": True,
                    "counts": counts,
                    "dropped": dict(dropped),
                    "metrics": _iteration_metrics(ranked, pairs, {**probed, **rollouts}),
                }
            )
        self.collector.ranks.barrier("iteration complete")

    def _manifest(
        self, iteration: int, policy_fingerprint: str, reestimation: Reestimation | None
    ) -> dict[str, Any]:
        rules = self.rules
        return {
            "iteration": iteration,
            "policy_fingerprint": policy_fingerprint,
            "seed": rules.seed,
            **self.made_with,
            "schedule": describe(rules.schedule),
            "selection": describe(rules.selection),
            "pairing": describe(rules.pairing),
            "pair_selection": describe(rules.pair_selection),
            "samples_per_prompt": rules.samples_per_prompt,
            "probe_samples": reestimation.samples if reestimation else rules.probe_samples,
            "smoothing": reestimation.smoothing if reestimation else 0.0,
            "too_long": list(self.too_long),
        }

    def _probe(
        self,
        store: IterationStore,
        candidates: Sequence[str],
        iteration: int,
        previous: StatisticsTable,
        reestimation: Reestimation | None,
    ) -> dict[str, list[Rollout]]:
        """Sample the candidates whose difficulty is unknown or due."""
        known = set(previous.prompt_ids)
        due = set(reestimation.prompt_ids) if reestimation else set()
        samples = reestimation.samples if reestimation else self.rules.probe_samples
        wanted = [
            Wanted(self.prompts[prompt_id], range(samples))
            for prompt_id in candidates
            if prompt_id not in known or prompt_id in due
        ]
        rows = self.collector.collect(store.shards, "probe", wanted, iteration=iteration, phase="probing")
        return dict(by_prompt(rows))

    def _top_up(
        self,
        store: IterationStore,
        selected: Sequence[str],
        probed: Mapping[str, list[Rollout]],
        iteration: int,
    ) -> dict[str, list[Rollout]]:
        """Sample what the selected prompts still lack, and return all their responses."""
        target = self.rules.samples_per_prompt
        wanted = [
            Wanted(self.prompts[prompt_id], range(have, target))
            for prompt_id in selected
            if (have := len(probed.get(prompt_id, ()))) < target
        ]
        rows = self.collector.collect(store.shards, "topup", wanted, iteration=iteration, phase="generating")
        more = by_prompt(rows)
        return {prompt_id: [*probed.get(prompt_id, ()), *more.get(prompt_id, ())] for prompt_id in selected}

    def _reference_pass(self, pairs: Sequence[PreferencePair], iteration: int) -> list[PreferencePair]:
        """Fill in the reference's log-probs, pairs of similar length together."""
        ranks, size = self.collector.ranks, self.rules.batch_size
        order = sorted(range(len(pairs)), key=lambda row: -_length(pairs[row]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = batches[ranks.rank :: ranks.world_size]
        found: list[tuple[int, float, float]] = []
        total, done, tokens = sum(map(len, mine)), 0, 0
        if mine:
            self.collector.notify("reference", iteration, done, total, tokens)
        with self.reference.reference_pass():
            for rows in mine:
                slot = StepSlot(step=0, steps=1, step_pairs=len(rows), last_in_step=True)
                batch = collate(
                    [pairs[row] for row in rows], real=len(rows), slot=slot, pad_token_id=self.pad_token_id
                )
                logps = self.reference.reference_logps(batch)
                found += zip(rows, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
                done += len(rows)
                tokens += int(batch.attention_mask.sum())
                self.collector.notify("reference", iteration, done, total, tokens)
        filled = list(pairs)
        for row, chosen, rejected in (item for part in ranks.gather(found) for item in part):
            filled[row] = replace(filled[row], reference_chosen_logp=chosen, reference_rejected_logp=rejected)
        return filled


def difficulty_after(
    rollouts: Mapping[str, Sequence[Rollout]],
    previous: StatisticsTable,
    *,
    iteration: int,
    smoothing: float,
) -> StatisticsTable:
    """Return ``previous`` with the prompts in ``rollouts`` estimated anew; non-finite rewards do not count."""
    rewards = {prompt_id: finite_rewards(rows) for prompt_id, rows in rollouts.items()}
    statistics = reward_statistics({key: values for key, values in rewards.items() if values})
    return previous.updated(
        estimate_difficulty(statistics, previous, iteration=iteration, smoothing=smoothing)
    )


def finite_rewards(rows: Sequence[Rollout]) -> list[float]:
    """Return the finite rewards among ``rows``."""
    return [row.reward for row in rows if row.reward is not None and math.isfinite(row.reward)]


def _length(pair: PreferencePair) -> int:
    responses = max(len(pair.chosen_token_ids), len(pair.rejected_token_ids))
    return len(pair.prompt_token_ids) + responses


def _iteration_metrics(
    ranked: StatisticsTable, pairs: Sequence[PreferencePair], sampled: Mapping[str, Sequence[Rollout]]
) -> dict[str, float]:
    """Return what the loggers get at an iteration's start; lengths in tokens."""
    quartiles = torch.quantile(ranked["difficulty"], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    means = [sum(values) / len(values) for rows in sampled.values() if (values := finite_rewards(rows))]
    rows = [row for group in sampled.values() for row in group]
    return {
        "iteration/reward/mean": sum(means) / len(means),
        "iteration/difficulty/mean": float(ranked["difficulty"].mean()),
        "iteration/difficulty/q25": float(quartiles[0]),
        "iteration/difficulty/q50": float(quartiles[1]),
        "iteration/difficulty/q75": float(quartiles[2]),
        "iteration/response_length/mean": sum(len(row.token_ids) for row in rows) / len(rows),
        "iteration/response_unfinished/share": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "iteration/pairs/count": float(len(pairs)),
        "iteration/pairs/gap": sum(p.chosen_reward - p.rejected_reward for p in pairs) / len(pairs),
    }
