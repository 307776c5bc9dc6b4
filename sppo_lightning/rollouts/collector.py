"""Fill a folder of rollout shards: sample, then score. The unit of work and of recovery is the shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from sppo_lightning.generation import Generator, PolicySource
from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts.requests import RolloutRequest, RolloutRequests
from sppo_lightning.rollouts.sampling import ShardSampler, is_stored
from sppo_lightning.rollouts.scoring import UnfinishedRule
from sppo_lightning.rollouts.shard_scorer import Scored, ScoringThread, ShardScorer
from sppo_lightning.rollouts.shard_size import prompts_per_shard
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import EncodedPrompt, Phase, PhaseProgress, Ranks, Rollout, UserError


@dataclass(frozen=True)
class Collector:
    """Samples and scores responses into shards; ranks take whole shards.

    Args:
        generator: the engine.
        reward: the scorer.
        device: where the reward is loaded.
        seed: the run's seed.
        prompts_per_shard: prompts of one Parquet file; ``None``: see
            :func:`~sppo_lightning.rollouts.shard_size.prompts_per_shard`.
        ranks: the processes that share the work.
        report: follows the phases.
        unfinished: what becomes of responses that a length limit cut; held-out answers are always kept.
        max_failed_share: share of a phase's responses that may fail, in [0, 1].
    """

    generator: Generator
    reward: Reward
    device: torch.device
    seed: int
    prompts_per_shard: int | None
    ranks: Ranks
    report: Callable[[PhaseProgress], None]
    unfinished: UnfinishedRule = field(default_factory=UnfinishedRule)
    max_failed_share: float = 0.5

    def collect(
        self,
        store: ShardStore,
        name: str,
        requests: Sequence[RolloutRequest],
        *,
        policy: PolicySource,
        iteration: int,
        phase: Phase,
    ) -> None:
        """Answer ``requests`` with ``policy`` into shards called ``name`` and score them.

        Shards that are already there are not made again.
        """
        shards = self._shards(requests)
        if self.ranks.rank == 0:
            store.quarantine_beyond(name, len(shards))
        sampler = self._sampler(store, name, shards, iteration=iteration, phase=phase, greedy=False)
        self._fill(sampler, policy, scores=True, opponents=None, unfinished=self.unfinished)

    def collect_greedy(
        self,
        store: ShardStore,
        name: str,
        prompts: Sequence[EncodedPrompt],
        *,
        policy: PolicySource,
        iteration: int,
        phase: Phase,
        score: bool = True,
        opponents: Mapping[str, str] = MappingProxyType({}),
    ) -> list[Rollout]:
        """Let ``policy`` answer each prompt greedily into shards called ``name``, and return the answers.

        They are scored unless ``score`` is false. ``opponents``: by prompt id, what a comparative reward compares an
        answer with; itself where there is none.
        """
        shards = self._shards(RolloutRequests(prompts, [range(1)] * len(prompts)))
        sampler = self._sampler(store, name, shards, iteration=iteration, phase=phase, greedy=True)
        self._fill(sampler, policy, scores=score, opponents=opponents, unfinished=UnfinishedRule())
        return list(store.read_all(name))

    def _shards(self, requests: Sequence[RolloutRequest]) -> list[Sequence[RolloutRequest]]:
        size = self.prompts_per_shard or prompts_per_shard(
            len(requests),
            max((len(item.sample_indices) for item in requests), default=1),
            max_new_tokens=self.generator.max_new_tokens,
        )
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _sampler(
        self,
        store: ShardStore,
        name: str,
        shards: Sequence[Sequence[RolloutRequest]],
        *,
        iteration: int,
        phase: Phase,
        greedy: bool,
    ) -> ShardSampler:
        return ShardSampler(
            generator=self.generator,
            store=store,
            name=name,
            shards=shards,
            seed=self.seed,
            iteration=iteration,
            phase=phase,
            greedy=greedy,
            ranks=self.ranks,
            report=self.report,
            max_failed_share=self.max_failed_share,
        )

    def _fill(
        self,
        sampler: ShardSampler,
        policy: PolicySource,
        *,
        scores: bool,
        opponents: Mapping[str, str] | None,
        unfinished: UnfinishedRule,
    ) -> None:
        """Sample what is missing of this process's shards, and score what has no rewards."""
        store, name, shards = sampler.store, sampler.name, sampler.shards
        mine = range(self.ranks.rank, len(shards), self.ranks.world_size)
        rows = policy.embedding_rows
        missing = [
            number for number in mine if not is_stored(store, name, number, shards, embedding_rows=rows)
        ]
        policy.sync_sampling_weights(self.ranks, needed=bool(missing))
        scorer = None
        if scores:
            scorer = ShardScorer(
                reward=self.reward,
                store=store,
                name=name,
                shards=shards,
                mine=mine,
                opponents=opponents,
                unfinished=unfinished,
                max_failed_share=self.max_failed_share,
            )
        try:
            meanwhile = self._sample(sampler, missing, policy, scorer)
            self.ranks.barrier(f"generated {name}")
        except UserError:  # of this process or another
            if scorer is not None:
                scorer.give_up()
            sampler.discard_failing()
            raise
        if scorer is not None:
            try:
                self._score(scorer, missing, sampler.iteration, meanwhile)
                self.ranks.barrier(f"scored {name}")
            except UserError:  # of this process or another
                scorer.give_up()
                raise
        self._check_shared(store, name, shards)

    def _sample(
        self,
        sampler: ShardSampler,
        missing: Sequence[int],
        policy: PolicySource,
        scorer: ShardScorer | None,
    ) -> ScoringThread | None:
        """Sample the missing shards, and return who scores them meanwhile: a reward on a server needs no turn."""
        if not missing:
            return None
        if scorer is None or not self.reward.remote:
            sampler.sample(missing, policy)
            return None
        self.reward.load(self.device)
        meanwhile = ScoringThread(scorer)
        try:
            for number in scorer.pending:
                meanwhile.put(number)
            sampler.sample(missing, policy, answered=meanwhile.check, written=meanwhile.put)
        except BaseException:
            meanwhile.stop()
            raise
        return meanwhile

    def _score(
        self, scorer: ShardScorer, missing: Sequence[int], iteration: int, meanwhile: ScoringThread | None
    ) -> None:
        """Score the shards that are not, or wait until they are."""
        pending = sorted([*scorer.pending, *missing])
        if not pending:
            return
        total = sum(len(scorer.shards[number]) for number in pending)

        told = -1

        def notify(done: Scored) -> None:
            nonlocal told
            self.ranks.check()
            if done.prompts > told:  # a phase is told once that it begins
                told = done.prompts
                self.notify("scoring", iteration, done.prompts, total, done.tokens)

        done = Scored(0, 0)
        notify(done)
        if meanwhile is not None:
            try:
                meanwhile.finish(notify)
            except BaseException:
                meanwhile.stop()
                raise
        else:
            self.reward.load(self.device)
            for number in pending:
                self.ranks.check()
                done = done.plus(scorer.score(number))
                notify(done)
        self.reward.unload()

    def notify(self, phase: Phase, iteration: int, done: int, total: int, tokens: int) -> None:
        """Report how far a phase has come."""
        self.report(PhaseProgress(phase, iteration, done, total, tokens))

    def _check_shared(self, store: ShardStore, name: str, shards: Sequence[Sequence[RolloutRequest]]) -> None:
        for number in range(len(shards)):
            if not store.path(name, number).exists():
                raise UserError(
                    f"{store.path(name, number)} was written by another process and is not here: "
                    "trainer.default_root_dir must be a folder that all nodes share"
                )
