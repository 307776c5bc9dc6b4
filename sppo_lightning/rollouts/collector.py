"""Fill a folder of rollout shards: generate, then score. The unit of work and of recovery is the shard."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, overload

import torch
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.generation import Generator, PolicySource, SampleRequest
from sppo_lightning.generation.protocol import malformed_ids
from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts.scoring import FailureWatch, ScoredRows, UnfinishedRule, score_rows
from sppo_lightning.rollouts.shard_requests import ShardRequests
from sppo_lightning.rollouts.shard_size import prompts_per_shard
from sppo_lightning.seeding import derive_seed
from sppo_lightning.store.shards import ShardKey, ShardStore
from sppo_lightning.system.durable import quarantine
from sppo_lightning.types import EncodedPrompt, Phase, PhaseProgress, Ranks, Response, Rollout, UserError

SECONDS_BETWEEN_REPORTS = 0.2  # while a batch is sampled
CUT_SHARE = 0.8
"""Share of a run's first responses, cut by the length limit, from which on it is said."""


class RolloutRequest(NamedTuple):
    """Which responses to sample for one prompt."""

    prompt: EncodedPrompt
    sample_indices: range


class RolloutRequests(Sequence[RolloutRequest]):
    """Requests of many prompts; an item is made when it is asked for, so that a shard is held at a time.

    Args:
        prompts: to answer; a slice of them should be cheap.
        samples: sample indices of each.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], samples: Sequence[range]) -> None:
        assert len(prompts) == len(samples)
        self._prompts = prompts
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def responses(self) -> int:
        """Responses that are asked for."""
        return sum(map(len, self._samples))

    @overload
    def __getitem__(self, row: int) -> RolloutRequest: ...
    @overload
    def __getitem__(self, row: slice) -> RolloutRequests: ...
    def __getitem__(self, row: int | slice) -> RolloutRequest | RolloutRequests:
        if isinstance(row, slice):
            return RolloutRequests(self._prompts[row], self._samples[row])
        return RolloutRequest(self._prompts[row], self._samples[row])


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
        self._generate(store, name, shards, policy=policy, iteration=iteration, phase=phase, greedy=False)
        self._score(store, name, shards, iteration=iteration, opponents=None, unfinished=self.unfinished)
        self._check_shared(store, name, shards)

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
        self._generate(store, name, shards, policy=policy, iteration=iteration, phase=phase, greedy=True)
        if score:
            self._score(
                store,
                name,
                shards,
                iteration=iteration,
                opponents=opponents,
                unfinished=UnfinishedRule(),
            )
        self._check_shared(store, name, shards)
        return list(store.read_all(name))

    def _shards(self, requests: Sequence[RolloutRequest]) -> list[Sequence[RolloutRequest]]:
        size = self.prompts_per_shard or prompts_per_shard(
            len(requests),
            max((len(item.sample_indices) for item in requests), default=1),
            max_new_tokens=self.generator.max_new_tokens,
        )
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _mine(self, shards: list[Sequence[RolloutRequest]]) -> list[int]:
        return list(range(self.ranks.rank, len(shards), self.ranks.world_size))

    def notify(self, phase: Phase, iteration: int, done: int, total: int, tokens: int) -> None:
        """Report how far a phase has come."""
        self.report(PhaseProgress(phase, iteration, done, total, tokens))

    def _follow(self, phase: Phase, iteration: int, done: int, total: int, tokens: int) -> None:
        """Have the engine report, a few times a second, how far the batch has come that it samples next."""
        last = time.monotonic()

        def report(prompts: float, sampled: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_REPORTS and done + prompts < total:
                last = time.monotonic()
                self.report(PhaseProgress(phase, iteration, done, total, tokens + sampled, prompts))

        self.generator.on_batch_progress = report

    def _generate(
        self,
        store: ShardStore,
        name: str,
        shards: list[Sequence[RolloutRequest]],
        *,
        policy: PolicySource,
        iteration: int,
        phase: Phase,
        greedy: bool,
    ) -> None:
        failing: list[int] = []  # shards written here that hold failures
        try:
            self._sample(
                store,
                name,
                shards,
                policy=policy,
                iteration=iteration,
                phase=phase,
                greedy=greedy,
                failing=failing,
            )
            self.ranks.barrier(f"generated {name}")
        except UserError:  # of this process or another: they are asked for again once the cause is mended
            for number in failing:
                store.path(name, number).unlink(missing_ok=True)
            raise

    def _sample(
        self,
        store: ShardStore,
        name: str,
        shards: list[Sequence[RolloutRequest]],
        *,
        policy: PolicySource,
        iteration: int,
        phase: Phase,
        greedy: bool,
        failing: list[int],
    ) -> None:
        """Sample the shards that are missing; ``failing`` gets the numbers of those that hold failures."""
        rows_there = policy.embedding_rows
        missing = [
            number
            for number in self._mine(shards)
            if not _check_or_quarantine(store, name, number, shards, embedding_rows=rows_there)
        ]
        total = sum(len(shards[number]) for number in missing)
        policy.sync_sampling_weights(self.ranks, needed=bool(missing))
        if missing:
            requested = sum(_responses(shards[number]) for number in missing)
            watch = FailureWatch(self.max_failed_share, requested)
            self.notify(phase, iteration, 0, total, 0)
            self.generator.load(policy)
            looks = phase == "probing" and iteration == 0
            done = tokens = 0
            for group in [missing] if self.generator.streams else [[number] for number in missing]:
                asked = ShardRequests(
                    {number: shards[number] for number in group},
                    partial(self._request, iteration=iteration, greedy=greedy),
                )
                rows: dict[int, dict[int, list[Rollout]]] = {}  # of each unfinished shard, by prompt
                unfinished = set(group)
                self._follow(phase, iteration, done, total, tokens)
                for answer in self.generator.generate(asked if self.generator.streams else list(asked)):
                    self.ranks.check()
                    number, row = asked.place(answer.request)
                    there = rows.setdefault(number, {})
                    there[row] = _rollouts(shards[number][row], answer.responses)
                    done += 1
                    tokens += sum(len(response.token_ids) for response in answer.responses)
                    self.notify(phase, iteration, done, total, tokens)
                    self._follow(phase, iteration, done, total, tokens)
                    if len(there) < len(shards[number]):
                        continue
                    unfinished.discard(number)
                    ordered = [one for _, some in sorted(rows.pop(number).items()) for one in some]
                    responses, error = _with_known_ids(ordered, rows_there)
                    watch.add(ScoredRows(responses, error))
                    if any(one.drop_reason is not None for one in responses):
                        failing.append(number)
                    if looks:
                        looks = False
                        self._look_at_lengths(responses, policy)
                    store.write(name, number, responses, prompts=_prompt_digests(shards[number]))
                unanswered = sum(len(shards[number]) - len(rows.get(number, ())) for number in unfinished)
                if unanswered:
                    raise UserError(
                        f"data.generator {type(self.generator).__name__} left {unanswered} of {len(asked)} prompts "
                        "without a response: it must answer every request"
                    )
            self.generator.on_batch_progress = None
            self.generator.unload()

    def _look_at_lengths(self, responses: Sequence[Rollout], policy: PolicySource) -> None:
        """Say it, once a run, if hardly a response has ended by itself."""
        answered = [row for row in responses if row.finish_reason != "failed"]
        cut = sum(row.finish_reason == "length" for row in answered)
        if answered and cut >= CUT_SHARE * len(answered):
            ends = ", ".join(map(repr, policy.tokenizer.convert_ids_to_tokens(sorted(policy.end_token_ids))))
            rank_zero_info(
                f"{cut} of the first {len(answered)} responses were cut by the length limit "
                f"(data.generator.init_args.max_new_tokens={self.generator.max_new_tokens}). Raise it if answers need "
                f"more; if they should have ended, see whether the model ends its turns by one of {ends}."
            )

    def _request(self, item: RolloutRequest, *, iteration: int, greedy: bool) -> SampleRequest:
        if greedy:
            return SampleRequest(item.prompt.token_ids, ())
        prompt_id = item.prompt.prompt.id
        seeds = tuple(derive_seed(self.seed, iteration, prompt_id, index) for index in item.sample_indices)
        return SampleRequest(item.prompt.token_ids, seeds)

    def _score(
        self,
        store: ShardStore,
        name: str,
        shards: list[Sequence[RolloutRequest]],
        *,
        iteration: int,
        opponents: Mapping[str, str] | None,
        unfinished: UnfinishedRule,
    ) -> None:
        unscored: dict[
            int, list[Rollout]
        ] = {}  # rows of the shards scored here that hold failures, as they were
        try:
            self._score_pending(
                store,
                name,
                shards,
                iteration=iteration,
                opponents=opponents,
                unfinished=unfinished,
                unscored=unscored,
            )
            self.ranks.barrier(f"scored {name}")
        except UserError:  # of this process or another: they are scored again once the cause is mended
            for number, rows in unscored.items():
                store.write(name, number, rows, prompts=_prompt_digests(shards[number]))
            raise

    def _score_pending(
        self,
        store: ShardStore,
        name: str,
        shards: list[Sequence[RolloutRequest]],
        *,
        iteration: int,
        opponents: Mapping[str, str] | None,
        unfinished: UnfinishedRule,
        unscored: dict[int, list[Rollout]],
    ) -> None:
        """Score the shards that are not; ``unscored`` gets the rows of those in which rewards failed."""
        mine = self._mine(shards)
        pending = [number for number in mine if not _key(store, name, number).scored]
        total = sum(len(shards[number]) for number in pending)
        if pending:
            done = tokens = 0
            watch = self._watch(store, name, mine)
            self.notify("scoring", iteration, done, total, tokens)
            self.reward.load(self.device)
            for number in pending:
                self.ranks.check()
                rows = store.read(name, number)
                assert rows is not None
                shard = list(shards[number])
                prompts = {item.prompt.prompt.id: item.prompt.prompt for item in shard}
                scored = score_rows(self.reward, rows, prompts, opponents=opponents)
                watch.add(scored)
                if any(
                    new.drop_reason != old.drop_reason for new, old in zip(scored.rows, rows, strict=True)
                ):
                    unscored[number] = rows
                store.write(
                    name,
                    number,
                    [unfinished.apply(row) for row in scored.rows],
                    prompts=_prompt_digests(shard),
                )
                done += len(shards[number])
                tokens += sum(len(row.token_ids) for row in rows)
                self.notify("scoring", iteration, done, total, tokens)
            self.reward.unload()

    def _watch(self, store: ShardStore, name: str, numbers: Sequence[int]) -> FailureWatch:
        """Return the watch over a phase, which remembers the shards that were scored before."""
        total = 0
        scored: list[tuple[int, list[str]]] = []  # responses of a shard, and why some were dropped
        for number in numbers:
            key = _key(store, name, number)
            total += len(key.rows)
            scored += [(len(key.rows), key.drop_reasons)] if key.scored else []
        watch = FailureWatch(self.max_failed_share, total)
        for responses, reasons in scored:
            watch.remember(responses, reasons)
        return watch

    def _check_shared(self, store: ShardStore, name: str, shards: list[Sequence[RolloutRequest]]) -> None:
        for number in range(len(shards)):
            if not store.path(name, number).exists():
                raise UserError(
                    f"{store.path(name, number)} was written by another process and is not here: "
                    "trainer.default_root_dir must be a folder that all nodes share"
                )


def _responses(shard: Sequence[RolloutRequest]) -> int:
    """Return how many responses a shard will hold; a prompt is not made for that."""
    if isinstance(shard, RolloutRequests):
        return shard.responses
    return sum(len(item.sample_indices) for item in shard)


def _key(store: ShardStore, name: str, number: int) -> ShardKey:
    key = store.key(name, number)
    assert key is not None
    return key


def _rollouts(item: RolloutRequest, responses: Sequence[Response]) -> list[Rollout]:
    """Return the rows of one prompt, not yet scored."""
    return [
        Rollout(
            prompt_id=item.prompt.prompt.id,
            sample_index=index,
            prompt=item.prompt.prompt.text,
            response=response.text,
            token_ids=response.token_ids,
            finish_reason=response.finish_reason,
            reward=None,
            drop_reason=response.drop_reason,
        )
        for index, response in zip(item.sample_indices, responses, strict=True)
    ]


def _with_known_ids(rows: Sequence[Rollout], embedding_rows: int) -> tuple[list[Rollout], str | None]:
    """Drop responses with token ids that the policy cannot have sampled; say what was wrong with the first of them.

    One of them stored would end every run in this folder.
    """
    found, error = [], None
    for row in rows:
        wrong = malformed_ids(row.token_ids, embedding_rows=embedding_rows)
        if wrong is not None:
            error = error or f"data.generator answered {wrong}"
            row = replace(row, token_ids=(), finish_reason="failed", drop_reason="malformed_answer")
        found.append(row)
    return found, error


def _check_or_quarantine(
    store: ShardStore,
    name: str,
    number: int,
    shards: list[Sequence[RolloutRequest]],
    *,
    embedding_rows: int,
) -> bool:
    """Return whether a shard is stored and intact; quarantine a damaged one, which can be sampled again."""
    if not store.path(name, number).exists():
        return False
    try:
        store.check(name, number, embedding_rows=embedding_rows)
    except UserError:
        quarantine(store.path(name, number))
        return False
    key = _key(store, name, number)
    shard = list(shards[number])
    expected = [(item.prompt.prompt.id, index) for item in shard for index in item.sample_indices]
    if key.rows != expected and store.has_quarantined:
        # a shard that was sampled again may change the selection, and so what is asked for here
        quarantine(store.path(name, number))
        return False
    if key.rows != expected:
        raise UserError(
            f"{store.path(name, number)} holds responses to other prompts than this config asks for: the prompt "
            "file changed since; use a new trainer.default_root_dir"
        )
    now = _prompt_digests(shard)
    changed = next(
        (key for key, digest in store.prompt_digests(name, number).items() if now[key] != digest), None
    )
    if changed is not None:
        raise UserError(
            f"{store.path(name, number)} holds responses to prompt {changed!r} when it had other token ids: its text, "
            "data.system_prompt or the chat template (with model.policy.template_date, where it prints the date) has "
            "changed since; put it back, or use a new trainer.default_root_dir"
        )
    return True


def _prompt_digests(shard: Iterable[RolloutRequest]) -> dict[str, str]:
    """Return a digest of each prompt's token ids, by prompt id."""
    return {
        item.prompt.prompt.id: hashlib.blake2b(array("q", item.prompt.token_ids), digest_size=8).hexdigest()
        for item in shard
    }
