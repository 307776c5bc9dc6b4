"""One self-play iteration's data: schedule, probe, select, top up, pair, reference.

Everything lands in the iteration's store as it comes; a second call resumes where the first one stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from sppo_lightning.difficulty import (
    Reestimation,
    StatisticsTable,
    estimate_difficulty,
    moved_with_policy,
    reward_statistics,
)
from sppo_lightning.generation import PolicySource
from sppo_lightning.iteration.pairing_pass import PairingPass
from sppo_lightning.iteration.reference_pass import Reference, reference_pass
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pairing import main_drop_reason, pair_statistics
from sppo_lightning.prompts.table import EncodedById
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.rollouts.requests import RolloutRequests
from sppo_lightning.selection import overlaps
from sppo_lightning.store.identity import identity
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.shards import by_prompt
from sppo_lightning.types import Phase, UserError

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class IterationBuilder:
    """Builds one iteration's pairs in its store.

    Args:
        rules: the scientific settings.
        prompts: encoded prompts by id, in file order.
        too_long: prompts that were dropped before.
        collector: samples and scores.
        policy: who answers.
        provenance: settings of the generator and the reward, for the manifest.
        reference: the frozen reference; ``None``: the loss needs none, and no pass is made.
        layout: of the reference pass.
        stores_token_logps: keep the reference's log-probs of single tokens too.
    """

    rules: IterationRules
    prompts: EncodedById
    too_long: Sequence[str]
    collector: Collector
    policy: PolicySource
    provenance: Mapping[str, Any]
    reference: Reference | None
    layout: PairLayout
    stores_token_logps: bool = False

    def build(
        self,
        store: IterationStore,
        *,
        iteration: int,
        previous: StatisticsTable,
        reestimation: Reestimation | None,
        policy_fingerprint: str,
        first_reference: str | None = None,
        earlier: Sequence[IterationStore] = (),
    ) -> None:
        """Make the iteration's data, or finish it.

        Args:
            store: where it goes.
            iteration: self-play iteration.
            previous: difficulties known so far.
            reestimation: which of them to estimate again; ``None``: only the unknown ones.
            policy_fingerprint: of the weights that answer.
            first_reference: digest of iteration 0's reference; ``None``: this is iteration 0.
            earlier: the iterations before, for rules that ask for what was known then.

        Raises:
            UserError: if fewer pairs come out than one optimizer step needs, or if a reference that has to stay is
                another one now.
        """
        rules = self.rules
        first = self.collector.ranks.rank == 0
        manifest = self._manifest(iteration, policy_fingerprint, reestimation)
        if first and store.read_manifest() is None:
            store.write_manifest({**manifest, "complete": False})
        self.collector.ranks.barrier(
            "manifest written"
        )  # before shards: they would say nothing of their policy
        dropped: Counter[str] = Counter({"too_long": len(self.too_long)})
        candidates = rules.schedule.candidates(
            list(self.prompts), iteration=iteration, iterations=rules.iterations, seed=rules.seed
        )
        dropped["not_scheduled"] = len(self.prompts) - len(candidates)

        probed = self._due(candidates, previous, reestimation)
        self._collect(store, "probe", probed, iteration, "probing")
        ranked, selected, found = self._select(
            store,
            candidates,
            previous,
            earlier,
            iteration=iteration,
            reestimation=reestimation,
            dropped=dropped,
        )
        missing = self._missing(selected, probed)
        self._collect(store, "topup", missing, iteration, "generating")
        made = PairingPass(rules, self.prompts, iteration, probed=probed)
        pairs = made.pairs(store.shards, candidates, set(selected))
        dropped += made.dropped
        reference = None
        if self.reference is not None:
            pairs, reference = reference_pass(
                pairs,
                self.reference,
                stored=store.reference_parts,
                layout=self.layout,
                batch_size=rules.batch_size,
                first_fingerprint=first_reference,
                stores_tokens=self.stores_token_logps,
                ranks=self.collector.ranks,
                report=partial(self.collector.notify, "reference", iteration),
            )
        difficulty = dict(zip(ranked.prompt_ids, ranked["difficulty"].tolist(), strict=True))
        statistics = pair_statistics(pairs.prompt_ids, pairs.statistics(), made.rewards, difficulty)
        statistics = replace(statistics, read_metadata=partial(self._metadata, pairs.prompt_ids))
        keep = rules.pair_selection.select(statistics, iteration=iteration, seed=rules.seed).tolist()
        pairs = pairs.kept(keep)
        paired = len(set(pairs.prompt_ids))
        dropped["pair_not_selected"] = len(made.rewards) - paired
        dropped_choices = made.dropped_choices + Counter(pair_not_selected=keep.count(False))

        counts = {"prompts": len(self.prompts) + len(self.too_long), "pairs": len(pairs)}
        counts |= {"probed": len(probed), "selected": len(selected), "paired_prompts": paired}
        dropped += Counter()  # forget the reasons that dropped nothing
        assert counts["prompts"] == paired + dropped.total()
        if len(pairs) < rules.pairs_per_step:
            chosen = len(pairs) + dropped_choices.total()
            several = f"; of {chosen} pairs that were chosen were dropped: {_reasons(dropped_choices)}"
            raise UserError(
                f"iteration {iteration} has {len(pairs)} pairs, fewer than one optimizer step of "
                f"data.pairs_per_step={rules.pairs_per_step}; of {counts['prompts']} prompts were dropped: "
                f"{_reasons(dropped)}{several if rules.most_pairs > 1 else ''}"
            )
        metrics = {**made.counters.metrics(), **_iteration_metrics(ranked, pairs), **found}
        if len(candidates) < len(self.prompts):
            every = self._due(list(self.prompts), previous, reestimation)
            saved = sum(map(len, every.values())) - sum(map(len, probed.values()))
            metrics["iteration/rollouts_saved"] = float(saved)
        if rules.most_pairs > 1:
            metrics["iteration/pairs/prompts"] = float(paired)
            metrics |= {
                f"iteration/pairs_dropped/{reason}": float(n) for reason, n in dropped_choices.items()
            }
        if first:
            store.write_pairs(pairs)
            store.write_manifest(
                {
                    **manifest,
                    "complete": True,
                    "reference_fingerprint": reference,
                    "counts": counts,
                    "dropped": dict(dropped),
                    "pairs_dropped": dict(dropped_choices),
                    "responses": made.counters.counts(),
                    "metrics": metrics,
                    "rule_states": rules.state_dict(),
                }
            )
            LOGGER.info("Iteration %d: policy %s, reference %s", iteration, policy_fingerprint, reference)
        self.collector.ranks.barrier("iteration complete")

    def _manifest(
        self, iteration: int, policy_fingerprint: str, reestimation: Reestimation | None
    ) -> dict[str, Any]:
        rules = self.rules
        return {
            "iteration": iteration,
            "policy_fingerprint": policy_fingerprint,
            "seed": rules.seed,
            **self.provenance,
            "schedule": identity(rules.schedule),
            "selection": identity(rules.selection),
            "pairing": identity(rules.pairing),
            "pair_selection": identity(rules.pair_selection),
            "samples_per_prompt": rules.samples_per_prompt,
            "probe_samples": rules.probe_samples,
            "reestimation_samples": reestimation.samples if reestimation else None,
            "smoothing": reestimation.smoothing if reestimation else 0.0,
            "reestimated_at_random": reestimation is not None and reestimation.at_random,
            "too_long": list(self.too_long),
        }

    def _collect(
        self, store: IterationStore, name: str, samples: Mapping[str, range], iteration: int, phase: Phase
    ) -> None:
        requests = RolloutRequests(self.prompts.taken(samples), list(samples.values()))
        self.collector.collect(
            store.shards, name, requests, policy=self.policy, iteration=iteration, phase=phase
        )

    def _missing(self, selected: Sequence[str], probed: Mapping[str, range]) -> dict[str, range]:
        """Return the sample indices that the selected prompts lack, which have those of ``probed``."""
        every = range(self.rules.samples_per_prompt)
        missing = {prompt_id: every[len(probed.get(prompt_id, ())) :] for prompt_id in selected}
        return {prompt_id: indices for prompt_id, indices in missing.items() if indices}

    def _due(
        self, candidates: Sequence[str], previous: StatisticsTable, reestimation: Reestimation | None
    ) -> dict[str, range]:
        """Return the candidates whose difficulty is unknown, or due, each with the indices of its probe's samples."""
        known = set(previous.prompt_ids)
        again = set(reestimation.prompt_ids) if reestimation else set()
        first = range(self.rules.probe_samples)
        later = range(reestimation.samples) if reestimation else first
        return {
            prompt_id: later if prompt_id in known else first
            for prompt_id in candidates
            if prompt_id not in known or prompt_id in again
        }

    def _select(
        self,
        store: IterationStore,
        candidates: Sequence[str],
        previous: StatisticsTable,
        earlier: Sequence[IterationStore],
        *,
        iteration: int,
        reestimation: Reestimation | None,
        dropped: Counter[str],
    ) -> tuple[StatisticsTable, list[str], dict[str, float]]:
        """Write the difficulties after the probe; return those of the candidates, and the ids of the selected ones.

        With them comes what is logged of the rules. ``dropped`` gets the reasons of the prompts that are not selected.
        """
        table = difficulty_after(
            store.shards.rewards("probe"),
            previous,
            iteration=iteration,
            smoothing=reestimation.smoothing if reestimation else 0.0,
            at_random=reestimation is not None and reestimation.at_random,
        )
        known = set(table.prompt_ids)
        dropped.update(self._drop_reasons(store, [key for key in candidates if key not in known]))
        ranked = table.rows([prompt_id for prompt_id in candidates if prompt_id in known])
        rules = self.rules
        metrics = rules.observe(self._offered(table, store, earlier), iteration=iteration)
        offered = self._offered(ranked, store, earlier)
        kept = rules.selection.select(offered, iteration=iteration, seed=rules.seed)
        if not self.collector.reward.comparative and not bool(kept.all()):
            shares = overlaps(offered, kept, iteration=iteration, seed=rules.seed)
            metrics |= {f"iteration/overlap/{name}": share for name, share in shares.items()}
        selected = [
            prompt_id for prompt_id, keep in zip(ranked.prompt_ids, kept.tolist(), strict=True) if keep
        ]
        dropped["not_selected"] = len(ranked) - len(selected)
        if self.collector.ranks.rank == 0:
            store.write_difficulty(table, set(selected))
        return ranked, selected, metrics

    def _offered(
        self, table: StatisticsTable, store: IterationStore, earlier: Sequence[IterationStore]
    ) -> StatisticsTable:
        """Return a table of prompts with all that a rule may ask for."""
        ids = table.prompt_ids
        return replace(
            table,
            read_responses=cache(lambda: store.shards.measured("probe", ids)),
            read_history=cache(lambda: tuple(one.known(ids) for one in earlier)),
            read_metadata=partial(self._metadata, ids),
        )

    def _metadata(self, prompt_ids: Sequence[str], name: str) -> tuple[Any, ...]:
        """Return what the prompt file says of some prompts under ``name``."""
        return tuple(self.prompts[prompt_id].prompt.metadata[name] for prompt_id in prompt_ids)

    def _drop_reasons(self, store: IterationStore, unknown: Sequence[str]) -> Counter[str]:
        """Return why prompts have no difficulty although they were probed."""
        if not unknown:
            return Counter()
        lost = set(unknown)
        groups = by_prompt(store.shards.stream("probe"))
        return Counter(main_drop_reason(rows) for prompt_id, rows in groups if prompt_id in lost)


def difficulty_after(
    rewards: Mapping[str, Sequence[float]],
    previous: StatisticsTable,
    *,
    iteration: int,
    smoothing: float,
    at_random: bool,
) -> StatisticsTable:
    """Return ``previous`` with the prompts that have usable ``rewards`` estimated anew.

    Args:
        rewards: of this iteration, by prompt id.
        previous: estimates so far.
        iteration: self-play iteration.
        smoothing: weight of an earlier estimate, in [0, 1).
        at_random: whether those that are estimated again are a random share; see
            :func:`~sppo_lightning.difficulty.moved_with_policy`.
    """
    newer = estimate_difficulty(
        reward_statistics(rewards), previous, iteration=iteration, smoothing=smoothing
    )
    return (moved_with_policy(previous, newer) if at_random else previous).updated(newer)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"


def _iteration_metrics(ranked: StatisticsTable, pairs: PairTable) -> dict[str, float]:
    """Return what the loggers get about difficulty and pairs at an iteration's start."""
    quartiles = torch.quantile(ranked["difficulty"], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    columns = pairs.statistics()
    return {
        "iteration/difficulty/mean": float(ranked["difficulty"].mean()),
        "iteration/difficulty/q25": float(quartiles[0]),
        "iteration/difficulty/q50": float(quartiles[1]),
        "iteration/difficulty/q75": float(quartiles[2]),
        "iteration/pairs/count": float(len(pairs)),
        "iteration/pairs/gap": float((columns["chosen_reward"] - columns["rejected_reward"]).mean()),
    }
