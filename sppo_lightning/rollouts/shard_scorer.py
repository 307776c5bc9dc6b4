"""Score the stored shards of a phase: after all are sampled, or in a thread while others are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts.requests import RolloutRequest, prompt_digests, response_count
from sppo_lightning.rollouts.scoring import FailureWatch, UnfinishedRule, score_rows
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import Rollout

LOOK_EVERY = 0.2  # seconds between two looks at a thread that scores


class Scored(NamedTuple):
    """What has been scored."""

    prompts: int
    tokens: int

    def plus(self, other: Scored) -> Scored:
        """Return both together."""
        return Scored(self.prompts + other.prompts, self.tokens + other.tokens)


@dataclass
class ShardScorer:
    """Scores shards called ``name`` with a reward that is loaded.

    Args:
        reward: the scorer.
        store: where the shards lie.
        name: of the shards.
        shards: what each was asked for.
        mine: numbers of the shards of this process.
        opponents: see :func:`~sppo_lightning.rollouts.scoring.score_rows`.
        unfinished: what becomes of responses that a length limit cut.
        max_failed_share: share of this process's responses that may fail, in [0, 1].
    """

    reward: Reward
    store: ShardStore
    name: str
    shards: Sequence[Sequence[RolloutRequest]]
    mine: Sequence[int]
    opponents: Mapping[str, str] | None
    unfinished: UnfinishedRule
    max_failed_share: float
    pending: list[int] = field(default_factory=list)  # stored shards that have no rewards
    _before: dict[int, list[Rollout]] = field(default_factory=dict)  # rows of shards in which rewards failed
    _writing: threading.Lock = field(default_factory=threading.Lock)
    given_up: bool = False  # whether no more is written

    def __post_init__(self) -> None:
        self._watch = FailureWatch(
            self.max_failed_share, sum(response_count(self.shards[number]) for number in self.mine)
        )
        for number in self.mine:
            key = self.store.key(self.name, number)
            if key is not None and key.scored:
                self._watch.remember(len(key.rows), key.drop_reasons)
            elif key is not None:
                self.pending.append(number)

    def score(self, number: int) -> Scored:
        """Score a stored shard, and store it with its rewards.

        Raises:
            UserError: if too many rewards fail, or the reward breaks its contract.
        """
        rows = self.store.read(self.name, number)
        assert rows is not None
        shard = list(self.shards[number])
        prompts = {item.prompt.prompt.id: item.prompt.prompt for item in shard}
        scored = score_rows(self.reward, rows, prompts, opponents=self.opponents)
        self._watch.add(scored)
        with self._writing:
            if not self.given_up:
                if any(
                    new.drop_reason != old.drop_reason for new, old in zip(scored.rows, rows, strict=True)
                ):
                    self._before[number] = rows
                final = [self.unfinished.apply(row) for row in scored.rows]
                self._write(number, final, shard)
        return Scored(len(prompts), sum(len(row.token_ids) for row in rows))

    def give_up(self) -> None:
        """Write no more, and take back rewards of shards in which some failed: they are scored again once mended."""
        with self._writing:
            self.given_up = True
            for number, rows in self._before.items():
                self._write(number, rows, self.shards[number])

    def _write(self, number: int, rows: Sequence[Rollout], shard: Sequence[RolloutRequest]) -> None:
        self.store.write(self.name, number, rows, prompts=prompt_digests(shard))


class ScoringThread:
    """Scores shards one after the other while the caller does something else; ends with its process.

    Args:
        scorer: of the shards, its reward loaded.
    """

    def __init__(self, scorer: ShardScorer) -> None:
        self._scorer = scorer
        self._todo: SimpleQueue[int | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._done = Scored(0, 0)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, number: int) -> None:
        """Have a stored shard scored."""
        self._todo.put(number)

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if self._error is not None:
            raise self._error

    def finish(self, look: Callable[[Scored], None]) -> None:
        """Wait until all shards are scored.

        Args:
            look: called now and then with what has been scored.
        """
        self._todo.put(None)
        while self._thread.is_alive():
            look(self._done)
            self._thread.join(LOOK_EVERY)
        self.check()
        look(self._done)

    def stop(self) -> None:
        """Begin no other shard."""
        self._stopped = True
        self._todo.put(None)

    def _run(self) -> None:
        try:
            while (number := self._todo.get()) is not None:
                if self._stopped or self._scorer.given_up:
                    return
                self._done = self._done.plus(self._scorer.score(number))
        except BaseException as error:
            self._error = error
