"""Fill a folder of rollout shards: generate, then score. The unit of work and of recovery is the shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sppo_lightning.generation import Generator, PolicySource, SampleRequest
from sppo_lightning.rewards import Reward
from sppo_lightning.rewards.protocol import checked_scores
from sppo_lightning.rollouts import ShardStore
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import EncodedPrompt, Phase, PhaseObserver, PhaseProgress, Ranks, Rollout, UserError


class Wanted(NamedTuple):
    """Responses wanted for one prompt."""

    prompt: EncodedPrompt
    sample_indices: range


@dataclass(frozen=True)
class Collector:
    """Samples and scores responses into shards; ranks take whole shards.

    Args:
        generator: the engine.
        reward: the scorer.
        policy: where the engine takes its weights from.
        device: where the reward is loaded.
        seed: the run's seed.
        prompts_per_shard: prompts of one Parquet file.
        ranks: the processes that share the work.
        observers: who follows the phases.
    """

    generator: Generator
    reward: Reward
    policy: PolicySource
    device: torch.device
    seed: int
    prompts_per_shard: int
    ranks: Ranks
    observers: Sequence[PhaseObserver]

    def collect(
        self, store: ShardStore, name: str, wanted: Sequence[Wanted], *, iteration: int, phase: Phase
    ) -> list[Rollout]:
        """Sample ``wanted`` into shards called ``name``, score them, and return all rows in order.

        Shards that are already there are not made again.
        """
        shards = self._shards(wanted)
        self._generate(store, name, shards, iteration=iteration, phase=phase, greedy=False)
        self._score(store, name, shards, iteration=iteration)
        return self._read(store, name, shards)

    def collect_greedy(
        self,
        store: ShardStore,
        name: str,
        prompts: Sequence[EncodedPrompt],
        *,
        iteration: int,
        phase: Phase,
        score: bool = True,
    ) -> list[Rollout]:
        """Answer each prompt greedily into shards called ``name``; score unless told not to."""
        shards = self._shards([Wanted(prompt, range(1)) for prompt in prompts])
        self._generate(store, name, shards, iteration=iteration, phase=phase, greedy=True)
        if score:
            self._score(store, name, shards, iteration=iteration)
        return self._read(store, name, shards)

    def _shards(self, wanted: Sequence[Wanted]) -> list[Sequence[Wanted]]:
        size = self.prompts_per_shard
        return [wanted[start : start + size] for start in range(0, len(wanted), size)]

    def _mine(self, shards: list[Sequence[Wanted]]) -> list[int]:
        return list(range(self.ranks.rank, len(shards), self.ranks.world_size))

    def notify(self, phase: Phase, iteration: int, done: int, total: int, tokens: int) -> None:
        """Tell the observers how far a phase has come."""
        for observer in self.observers:
            observer.on_phase_progress(PhaseProgress(phase, iteration, done, total, tokens))

    def _generate(
        self,
        store: ShardStore,
        name: str,
        shards: list[Sequence[Wanted]],
        *,
        iteration: int,
        phase: Phase,
        greedy: bool,
    ) -> None:
        missing = [number for number in self._mine(shards) if not _present(store, name, number, shards)]
        total = sum(len(shards[number]) for number in missing)
        if missing:
            done = tokens = 0
            self.notify(phase, iteration, done, total, tokens)
            self.generator.load(self.policy)
            for number in missing:
                rows: list[list[Rollout]] = [[] for _ in shards[number]]
                requests = [self._request(item, iteration, greedy) for item in shards[number]]
                for answer in self.generator.generate(requests):
                    item = shards[number][answer.request]
                    rows[answer.request] = [
                        Rollout(
                            prompt_id=item.prompt.prompt.id,
                            sample_index=index,
                            prompt=item.prompt.prompt.text,
                            response=response.text,
                            token_ids=response.token_ids,
                            finish_reason=response.finish_reason,
                            reward=None,
                        )
                        for index, response in zip(item.sample_indices, answer.responses, strict=True)
                    ]
                    done += 1
                    tokens += sum(len(response.token_ids) for response in answer.responses)
                    self.notify(phase, iteration, done, total, tokens)
                unanswered = rows.count([])
                if unanswered:
                    raise UserError(
                        f"data.generator {type(self.generator).__name__} left {unanswered} of {len(rows)} prompts "
                        "without a response: it must answer every request"
                    )
                store.write(name, number, [row for group in rows for row in group])
            self.generator.unload()
        self.ranks.barrier(f"generated {name}")

    def _request(self, item: Wanted, iteration: int, greedy: bool) -> SampleRequest:
        if greedy:
            return SampleRequest(item.prompt.token_ids, ())
        prompt_id = item.prompt.prompt.id
        seeds = tuple(derive_seed(self.seed, iteration, prompt_id, index) for index in item.sample_indices)
        return SampleRequest(item.prompt.token_ids, seeds)

    def _score(self, store: ShardStore, name: str, shards: list[Sequence[Wanted]], *, iteration: int) -> None:
        pending: list[tuple[int, list[Rollout]]] = []
        for number in self._mine(shards):
            rows = store.read(name, number)
            assert rows is not None
            if any(row.reward is None for row in rows):
                pending.append((number, rows))
        total = sum(len(shards[number]) for number, _ in pending)
        if pending:
            done = tokens = 0
            self.notify("scoring", iteration, done, total, tokens)
            self.reward.load(self.device)
            for number, rows in pending:
                prompts = {item.prompt.prompt.id: item.prompt.prompt for item in shards[number]}
                scores = checked_scores(
                    self.reward, [prompts[row.prompt_id] for row in rows], [row.response for row in rows]
                )
                store.write(
                    name,
                    number,
                    [replace(row, reward=score) for row, score in zip(rows, scores, strict=True)],
                )
                done += len(shards[number])
                tokens += sum(len(row.token_ids) for row in rows)
                self.notify("scoring", iteration, done, total, tokens)
            self.reward.unload()
        self.ranks.barrier(f"scored {name}")

    def _read(self, store: ShardStore, name: str, shards: list[Sequence[Wanted]]) -> list[Rollout]:
        found: list[Rollout] = []
        for number in range(len(shards)):
            rows = store.read(name, number)
            if rows is None:
                raise UserError(
                    f"{store.path(name, number)} was written by another process and is not here: "
                    "trainer.default_root_dir must be a folder that all nodes share"
                )
            found += rows
        return found


def _present(store: ShardStore, name: str, number: int, shards: list[Sequence[Wanted]]) -> bool:
    rows = store.read(name, number)
    if rows is None:
        return False
    expected = [(item.prompt.prompt.id, index) for item in shards[number] for index in item.sample_indices]
    if [(row.prompt_id, row.sample_index) for row in rows] != expected:
        raise UserError(
            f"{store.path(name, number)} holds responses to other prompts than this config asks for: the prompt "
            "file changed since; use a new trainer.default_root_dir"
        )
    return True


def by_prompt(rows: Sequence[Rollout]) -> Mapping[str, list[Rollout]]:
    """Group rollouts by prompt, in order of first appearance."""
    groups: dict[str, list[Rollout]] = {}
    for row in rows:
        groups.setdefault(row.prompt_id, []).append(row)
    return groups
