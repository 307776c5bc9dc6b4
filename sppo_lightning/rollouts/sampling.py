"""Sample the shards of a phase that are not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.generation import Generator, PolicySource, SampleRequest
from sppo_lightning.generation.protocol import malformed_ids
from sppo_lightning.rollouts.requests import RolloutRequest, ShardRequests, prompt_digests, response_count
from sppo_lightning.rollouts.scoring import FailureWatch, ScoredRows
from sppo_lightning.seeding import derive_seed
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.system.durable import quarantine
from sppo_lightning.types import Phase, PhaseProgress, Ranks, Response, Rollout, UserError

SECONDS_BETWEEN_REPORTS = 0.2  # while a batch is sampled
CUT_SHARE = 0.8
"""Share of a run's first responses, cut by the length limit, from which on it is said."""


@dataclass
class ShardSampler:
    """Samples shards called ``name`` of one phase.

    Args:
        generator: the engine.
        store: where the shards lie.
        name: of the shards.
        shards: what each asks for.
        seed: the run's seed.
        iteration: of the run.
        phase: that is reported.
        greedy: whether the answers are greedy.
        ranks: the processes that share the work.
        report: follows the phase.
        max_failed_share: share of the responses that may fail, in [0, 1].
    """

    generator: Generator
    store: ShardStore
    name: str
    shards: Sequence[Sequence[RolloutRequest]]
    seed: int
    iteration: int
    phase: Phase
    greedy: bool
    ranks: Ranks
    report: Callable[[PhaseProgress], None]
    max_failed_share: float
    _failing: list[int] = field(default_factory=list)  # shards written here that hold failures
    _done: int = 0  # prompts
    _tokens: int = 0
    _total: int = 0  # prompts

    def sample(
        self,
        missing: Sequence[int],
        policy: PolicySource,
        *,
        answered: Callable[[], None] = lambda: None,
        written: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Sample the shards with the numbers ``missing``, none of which is stored.

        Args:
            missing: numbers of the shards, at least one.
            policy: that answers.
            answered: called as a prompt's responses are there.
            written: called with a shard's number once it is stored.

        Raises:
            UserError: if too many responses fail, or the engine leaves out a prompt.
        """
        self._total = sum(len(self.shards[number]) for number in missing)
        watch = FailureWatch(
            self.max_failed_share, sum(response_count(self.shards[number]) for number in missing)
        )
        looks = self.phase == "probing" and self.iteration == 0
        self._report(0.0, 0)
        self.generator.load(policy)
        for group in [missing] if self.generator.streams else [[number] for number in missing]:
            for shard, number, rows in self._answers(group, answered):
                responses, error = _with_known_ids(rows, policy.embedding_rows)
                watch.add(ScoredRows(responses, error))
                if any(one.drop_reason is not None for one in responses):
                    self._failing.append(number)
                if looks:
                    looks = False
                    self._look_at_lengths(responses, policy)
                self.store.write(self.name, number, responses, prompts=prompt_digests(shard))
                written(number)
        self.generator.on_batch_progress = None
        self.generator.unload()

    def discard_failing(self) -> None:
        """Remove the shards that hold failures: they are asked for again once the cause is mended."""
        for number in self._failing:
            self.store.path(self.name, number).unlink(missing_ok=True)

    def _answers(
        self, group: Sequence[int], answered: Callable[[], None]
    ) -> Iterator[tuple[list[RolloutRequest], int, list[Rollout]]]:
        """Yield what each of some shards asked for, its number and its rows, as it is complete."""
        held: dict[int, list[RolloutRequest]] = {}  # of shards that are under way
        found: dict[int, dict[int, list[Rollout]]] = {number: {} for number in group}  # by prompt

        def request(number: int, row: int) -> SampleRequest:
            if number not in held:
                held[number] = list(self.shards[number])
            return self._request(held[number][row])

        asked = ShardRequests({number: len(self.shards[number]) for number in group}, request)
        self._follow()
        for answer in self.generator.generate(asked if self.generator.streams else list(asked)):
            self.ranks.check()
            number, row = asked.place(answer.request)
            if row in found.get(number, {row}):
                raise UserError(
                    f"data.generator {type(self.generator).__name__} answered a request twice, number {answer.request}"
                )
            found[number][row] = _rollouts(held[number][row], answer.responses)
            self._done += 1
            self._tokens += sum(len(response.token_ids) for response in answer.responses)
            self._report(0.0, 0)
            self._follow()
            answered()
            if len(found[number]) == len(held[number]):
                rows = [one for _, each in sorted(found.pop(number).items()) for one in each]
                yield held.pop(number), number, rows
        unanswered = sum(len(self.shards[number]) - len(rows) for number, rows in found.items())
        if unanswered:
            raise UserError(
                f"data.generator {type(self.generator).__name__} left {unanswered} of {len(asked)} prompts "
                "without a response: it must answer every request"
            )

    def _report(self, prompts: float, tokens: int) -> None:
        """Report how far the phase has come, with some prompts and tokens of the batch that is being sampled."""
        progress = PhaseProgress(
            self.phase, self.iteration, self._done, self._total, self._tokens + tokens, prompts
        )
        self.report(progress)

    def _follow(self) -> None:
        """Have the engine report, a few times a second, how far the batch has come that it samples next."""
        last = time.monotonic()

        def report(prompts: float, sampled: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_REPORTS and self._done + prompts < self._total:
                last = time.monotonic()
                self._report(prompts, sampled)

        self.generator.on_batch_progress = report

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

    def _request(self, item: RolloutRequest) -> SampleRequest:
        if self.greedy:
            return SampleRequest(item.prompt.token_ids, ())
        prompt_id = item.prompt.prompt.id
        seeds = tuple(
            derive_seed(self.seed, self.iteration, prompt_id, index) for index in item.sample_indices
        )
        return SampleRequest(item.prompt.token_ids, seeds)


def is_stored(
    store: ShardStore,
    name: str,
    number: int,
    shards: Sequence[Sequence[RolloutRequest]],
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
    key = store.key(name, number)
    assert key is not None
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
    now = prompt_digests(shard)
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
