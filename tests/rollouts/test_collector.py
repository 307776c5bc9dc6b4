"""Filling a folder of rollout shards."""

from __future__ import annotations

import errno
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.fakes import (
    UNSAMPLED,
    Alone,
    Digits,
    Echo,
    Threads,
    collector,
    encoded,
    files,
    same,
    together,
    wanted_of,
    with_settings,
)
from support.models import byte_tokenizer
from support.tiny import Source, random_tokens, tiny_model

from sppo_lightning.generation import (
    CachedGenerator,
    HFGenerator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.rollouts.requests import RolloutRequest, RolloutRequests
from sppo_lightning.seeding import derive_seed
from sppo_lightning.store.shards import ShardStore, by_prompt, merged, write_rollouts
from sppo_lightning.types import (
    EncodedPrompt,
    Message,
    PhaseProgress,
    Prompt,
    Ranks,
    Rollout,
    UserError,
)


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "rollouts")


def collect(
    store: ShardStore,
    wanted: Sequence[RolloutRequest],
    iteration: int = 3,
    policy: PolicySource = UNSAMPLED,
    **settings: Any,
) -> list[Rollout]:
    collector(**settings).collect(store, "probe", wanted, policy=policy, iteration=iteration, phase="probing")
    return list(store.read_all("probe"))


# ------------------------------------------------------------------ what is kept


def test_rows_hold_what_was_sampled_in_the_order_wanted(store: ShardStore) -> None:
    """Seeds are derived from the run's seed, the iteration, the prompt and the sample, and nothing else."""
    rows = collect(store, wanted_of(3, range(1, 3)))
    expected = []
    for number in range(3):
        for index in (1, 2):
            seed = derive_seed(5, 3, f"p{number}", index)
            expected.append(
                Rollout(
                    prompt_id=f"p{number}",
                    sample_index=index,
                    prompt=f"text {number}",
                    response=f"level 0 seed {seed}",
                    token_ids=(number, number + 1, 0, seed % 1000),
                    finish_reason="stop" if seed % 2 else "length",
                    reward=math.nan if seed % 10 == 7 else float(seed % 10),
                    drop_reason="non_finite_reward" if seed % 10 == 7 else None,
                )
            )
    assert same(rows, expected)
    assert list(files(store)) == ["probe-00000.parquet", "probe-00001.parquet"]


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_shards_size_changes_no_row(tmp_path: Path, size: int) -> None:
    expected = collect(ShardStore(tmp_path / "a"), wanted_of(5))
    assert same(collect(ShardStore(tmp_path / "b"), wanted_of(5), prompts_per_shard=size), expected)


@pytest.mark.parametrize("change", [{"seed": 6}, {"iteration": 4}])
def test_seed_and_iteration_change_every_sample(tmp_path: Path, change: dict[str, int]) -> None:
    first = collect(ShardStore(tmp_path / "a"), wanted_of(3))
    second = collect(ShardStore(tmp_path / "b"), wanted_of(3), **change)
    assert all(a.response != b.response for a, b in zip(first, second, strict=True))


def test_a_real_engine_gives_the_same_rows_whatever_the_shards(tmp_path: Path) -> None:
    prompts = [
        RolloutRequest(EncodedPrompt(Prompt(f"p{n}", "", ()), tokens), range(2))
        for n, tokens in enumerate(random_tokens(3, 20, 1, 8))
    ]
    found = []
    for size in (1, 4):
        engine = HFGenerator(max_new_tokens=6, temperature=1.0, batch_size=8 // size)
        reward = Digits()
        reward.score = lambda prompts, responses: [float(len(text)) for text in responses]  # type: ignore[method-assign]
        found.append(
            collect(
                ShardStore(tmp_path / str(size)),
                prompts,
                generator=engine,
                reward=reward,
                policy=Source(tiny_model()),
                prompts_per_shard=size,
            )
        )
    assert found[0] == found[1]
    assert len({row.token_ids for row in found[0]}) == 8
    assert [row.response for row in found[0]] == [
        byte_tokenizer().decode(row.token_ids, skip_special_tokens=True) for row in found[0]
    ]


def test_the_engine_is_freed_before_the_reward_is_loaded(store: ShardStore) -> None:
    events: list[str] = []
    collect(store, wanted_of(3), generator=Echo(events=events), reward=Digits(events=events))
    assert events == [
        *("load", "generate", "generate", "unload"),
        *("load reward on cpu", "score", "score", "unload reward"),
    ]


@dataclass
class Syncing:
    """A policy that records what it is asked."""

    events: list[str]
    embedding_rows: int = 2**31

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None:
        self.events.append(f"sync {needed}")


def test_weights_are_synced_before_they_are_loaded_and_by_a_rank_without_work_too(store: ShardStore) -> None:
    events: list[str] = []
    policy: Any = Syncing(events)
    collect(store, wanted_of(1), policy=policy, generator=Echo(events=events))
    assert events == ["sync True", "load", "generate", "unload"]
    collect(store, wanted_of(1), policy=policy, generator=Echo(events=events))
    assert events[4:] == ["sync False"]


# ------------------------------------------------------------- reuse and recovery


def test_a_second_call_makes_nothing_again(store: ShardStore) -> None:
    expected = collect(store, wanted_of(5))
    before = files(store)
    generator, reward = Echo(), Digits()
    assert same(collect(store, wanted_of(5), generator=generator, reward=reward), expected)
    assert generator.events == reward.events == []
    assert files(store) == before


def test_a_run_that_broke_down_while_sampling_repeats_the_missing_shards_only(
    tmp_path: Path, store: ShardStore
) -> None:
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(6))
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(store, wanted_of(6), generator=Echo(fail_at=1))
    assert list(files(store)) == ["probe-00000.parquet"]
    generator, reward = Echo(), Digits()
    assert same(collect(store, wanted_of(6), generator=generator, reward=reward), expected)
    assert [request.token_ids[0] for request in generator.asked] == [2, 3, 4, 5]
    assert reward.scored == 12


def test_a_run_that_broke_down_while_scoring_scores_the_other_shards_only(
    tmp_path: Path, store: ShardStore
) -> None:
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(6))
    with pytest.raises(KeyboardInterrupt):
        collect(store, wanted_of(6), reward=Digits(fail_at=1))
    scored = [row.reward is not None for row in store.read_all("probe")]
    assert scored == [True] * 4 + [False] * 8
    generator, reward = Echo(), Digits()
    assert same(collect(store, wanted_of(6), generator=generator, reward=reward), expected)
    assert generator.calls == 0
    assert reward.scored == 8


def test_a_hole_in_the_middle_is_filled(store: ShardStore) -> None:
    expected = collect(store, wanted_of(6))
    store.path("probe", 1).unlink()
    generator = Echo()
    assert same(collect(store, wanted_of(6), generator=generator), expected)
    assert [request.token_ids[0] for request in generator.asked] == [2, 3]


def flipped(content: bytes, column: str, path: Path) -> bytes:
    """One bit of a column's data changed."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("column", ["prompt_id", "token_ids", "response", "reward", None])
def test_a_damaged_shard_is_kept_aside_and_made_again(
    tmp_path: Path, store: ShardStore, column: str | None, scored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever column it is, also one that is not read to see whether the shard is there; ``None``: cut short."""
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(6))
    collect(store, wanted_of(6))
    path = store.path("probe", 1)
    if not scored:
        write_rollouts(path, [replace(row, reward=None) for row in expected[4:8]])
    whole = path.read_bytes()
    harmed = whole[:-9] if column is None else flipped(whole, column, path)
    path.write_bytes(harmed)
    generator, reward = Echo(), Digits()
    assert same(collect(store, wanted_of(6), generator=generator, reward=reward), expected)
    assert [request.token_ids[0] for request in generator.asked] == [2, 3]
    assert reward.scored == 4
    assert path.with_name("probe-00001.parquet.damaged").read_bytes() == harmed
    assert len(files(store)) == 4
    (message,) = [text for text in caplog.messages if "damaged" in text]
    assert message == f"{path} is damaged: it is kept as probe-00001.parquet.damaged and made anew"
    caplog.clear()
    assert same(collect(store, wanted_of(6), generator=Echo(fail_at=0)), expected)
    assert not caplog.messages


# ------------------------------------------------------------- token ids of no policy


@dataclass
class Vocabulary:
    """A policy with few embeddings."""

    embedding_rows: int = 3000

    def sync_sampling_weights(self, ranks: Ranks, *, needed: bool) -> None: ...


SMALL: Any = Vocabulary()


@dataclass
class Poisoned(Echo):
    """Gives the second response to a prompt ``token`` among its ids."""

    token: Any = 3000

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        for answer in super().generate(requests):
            first, second, *rest = answer.responses
            second = replace(second, token_ids=(*second.token_ids, self.token))
            yield answer._replace(responses=[first, second, *rest])


@pytest.mark.parametrize("token", [3000, -1, 2**40, True, 7.0, None, "7"])
def test_a_response_with_ids_that_the_policy_lacks_takes_no_part(
    tmp_path: Path, store: ShardStore, token: Any
) -> None:
    """Whichever engine gave it; stored, it would end every run in this folder."""
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(3, range(3)), policy=SMALL)
    rows = collect(store, wanted_of(3, range(3)), policy=SMALL, generator=Poisoned(token=token))
    assert [row.drop_reason for row in rows[1::3]] == ["malformed_answer"] * 3
    assert [(row.token_ids, row.finish_reason) for row in rows[1::3]] == [((), "failed")] * 3
    assert same(rows[::3] + rows[2::3], expected[::3] + expected[2::3])


def test_ids_of_numpy_and_the_last_one_are_ids(store: ShardStore) -> None:
    for place, token in enumerate((2999, np.int64(2999), 0)):
        part = ShardStore(store.folder / str(place))
        rows = collect(part, wanted_of(1), policy=SMALL, generator=Poisoned(token=token))
        assert rows[1].token_ids[-1] == token
        assert rows[1].drop_reason != "malformed_answer"


def test_too_many_of_them_say_what_came(store: ShardStore) -> None:
    message = (
        r"^4 of 4 responses are of no use \(4 malformed_answer\).*; the first error: data.generator answered token id "
        r"\d+, but the policy has ids from 0 to 1 only: "
    )
    with pytest.raises(UserError, match=message):
        collect(store, wanted_of(2), policy=Vocabulary(2))
    assert not store.folder.exists()


@pytest.mark.parametrize("scored", [True, False])
def test_a_stored_response_with_such_ids_heals(tmp_path: Path, store: ShardStore, scored: bool) -> None:
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(6), policy=SMALL)
    collect(store, wanted_of(6), policy=SMALL)
    path = store.path("probe", 1)
    rows = expected[4:8] if scored else [replace(row, reward=None) for row in expected[4:8]]
    write_rollouts(path, [*rows[:3], replace(rows[3], token_ids=(1, 3000))])
    poisoned, generator = path.read_bytes(), Echo()
    assert same(collect(store, wanted_of(6), policy=SMALL, generator=generator), expected)
    assert [request.token_ids[0] for request in generator.asked] == [2, 3]
    assert path.with_name("probe-00001.parquet.damaged").read_bytes() == poisoned


def test_what_was_asked_for_because_of_a_shard_that_was_sampled_again_is_asked_for_again(
    store: ShardStore,
) -> None:
    """An engine that is not reproducible gives other responses, and the selection may be another one."""
    wanted = wanted_of(6)
    collect(store, wanted[:4])
    path = store.path("probe", 0)
    path.write_bytes(path.read_bytes()[:-9])
    collect(store, wanted[:2])
    rows = collect(store, [*wanted[:2], *wanted[4:]])
    assert [row.prompt_id for row in rows] == ["p0", "p0", "p1", "p1", "p4", "p4", "p5", "p5"]


def test_a_disk_that_refuses_to_be_read_is_no_damage(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(store, wanted_of(2))
    before = files(store)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            collect(store, wanted_of(2))
    assert files(store) == before


def test_a_reward_of_nan_is_a_score(store: ShardStore) -> None:
    rows = collect(store, wanted_of(40))
    assert any(row.reward is not None and math.isnan(row.reward) for row in rows)
    reward = Digits()
    collect(store, wanted_of(40), reward=reward)
    assert reward.calls == 0


@pytest.mark.parametrize(
    "other",
    [
        [*wanted_of(3), RolloutRequest(encoded(1, 9)[0], range(2))],
        wanted_of(4, range(3)),
        wanted_of(4)[::-1],
        wanted_of(3),
    ],
    ids=["another prompt", "more samples", "another order", "fewer prompts"],
)
def test_shards_of_other_prompts_are_refused(store: ShardStore, other: list[RolloutRequest]) -> None:
    collect(store, wanted_of(4))
    before = files(store)
    message = (
        r"probe-0000[01]\.parquet holds responses to other prompts than this config asks for: the prompt file "
        r"changed since; use a new trainer\.default_root_dir$"
    )
    with pytest.raises(UserError, match=message):
        collect(store, other)
    assert files(store) == before


def test_a_prompt_with_other_token_ids_is_another_prompt(store: ShardStore) -> None:
    """Its file was edited, or its template prints another date: yesterday's answers are no answers to it."""
    wanted = wanted_of(4)
    collect(store, wanted)
    changed = [*wanted[:3], wanted[3]._replace(prompt=replace(wanted[3].prompt, token_ids=(7, 7)))]
    with pytest.raises(
        UserError, match=r"probe-00001\.parquet holds responses to prompt 'p3' when it had other token"
    ):
        collect(store, changed)
    collect(store, wanted)
    write_rollouts(
        store.path("probe", 1), store.read("probe", 1) or []
    )  # as before shards knew of their prompts
    collect(store, changed)


def test_shards_of_another_name_are_others(store: ShardStore) -> None:
    collect(store, wanted_of(4))
    collector().collect(
        store, "topup", wanted_of(2, range(2, 5)), policy=UNSAMPLED, iteration=3, phase="generating"
    )
    assert [row.sample_index for row in store.read_all("topup")] == [2, 3, 4] * 2
    assert sorted(files(store)) == ["probe-00000.parquet", "probe-00001.parquet", "topup-00000.parquet"]


def test_nothing_wanted(store: ShardStore) -> None:
    generator, reward = Echo(), Digits()
    assert collect(store, [], generator=generator, reward=reward) == []
    assert generator.events == reward.events == []


# --------------------------------------------------------------- several processes


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_make_the_shards_of_one(tmp_path: Path, world_size: int) -> None:
    """Also more ranks than shards; every rank reads all rows."""
    for count in (2, 7):
        alone = ShardStore(tmp_path / f"alone-{count}")
        expected = collect(alone, wanted_of(count))
        shared = ShardStore(tmp_path / f"shared-{count}")
        meeting = threading.Barrier(world_size)
        engines = [Echo() for _ in range(world_size)]
        found: dict[int, list[Rollout]] = {}

        def run(
            rank: int,
            count: int = count,
            shared: ShardStore = shared,
            meeting: threading.Barrier = meeting,
            engines: list[Echo] = engines,
            found: dict[int, list[Rollout]] = found,
        ) -> None:
            ranks = Threads(rank, world_size, meeting)
            found[rank] = collect(shared, wanted_of(count), generator=engines[rank], ranks=ranks)

        together(run, world_size)
        assert files(shared) == files(alone)
        assert all(same(found[rank], expected) for rank in range(world_size))
        shards = -(-count // 2)
        assert [engine.calls for engine in engines] == [
            len(range(rank, shards, world_size)) for rank in range(world_size)
        ]


def test_a_rank_takes_over_what_another_left(tmp_path: Path, store: ShardStore) -> None:
    """One of two ranks ran; then the run goes on with one."""
    expected = collect(ShardStore(tmp_path / "whole"), wanted_of(8))
    with pytest.raises(UserError, match="a folder that all nodes share"):  # for those of the other one
        collect(store, wanted_of(8), ranks=Alone(0, 2))
    assert list(files(store)) == ["probe-00000.parquet", "probe-00002.parquet"]
    generator = Echo()
    assert same(collect(store, wanted_of(8), generator=generator), expected)
    assert [request.token_ids[0] for request in generator.asked] == [2, 3, 6, 7]


# ----------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("reason", "iteration", "said"), [("length", 0, True), ("length", 1, False), ("stop", 0, False)]
)
def test_responses_that_never_end_are_said_once(
    reason: Any, iteration: int, said: bool, store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose end of a turn nobody names runs on to the limit, and scores badly for it."""

    class Cut(Echo):
        max_new_tokens = 8

        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for answer in super().generate(requests):
                rows = [
                    replace(response, finish_reason=reason, token_ids=(3, 4)) for response in answer.responses
                ]
                yield answer._replace(responses=rows)

    found: list[str] = []
    monkeypatch.setattr("sppo_lightning.rollouts.sampling.rank_zero_info", found.append)
    policy = Source(tiny_model())
    collect(store, wanted_of(4, range(3)), iteration, policy, generator=Cut(), prompts_per_shard=2)
    assert len(found) == said
    if said:
        assert found[0].startswith(
            "6 of the first 6 responses were cut by the length limit (data.generator.init"
        )
        assert found[0].endswith("see whether the model ends its turns by one of '<eos>'.")


# ------------------------------------------------------------------------ greedy


def test_greedy_answers_ask_without_seeds(store: ShardStore) -> None:
    generator = Echo()
    rows = collector(generator).collect_greedy(
        store, "greedy", encoded(3), policy=UNSAMPLED, iteration=1, phase="evaluating"
    )
    assert [request.seeds for request in generator.asked] == [()] * 3
    assert [(row.prompt_id, row.sample_index, row.reward) for row in rows] == [
        (f"p{number}", 0, 0.0) for number in range(3)
    ]


def test_greedy_answers_can_stay_unscored(store: ShardStore) -> None:
    reward = Digits()
    rows = collector(reward=reward).collect_greedy(
        store, "greedy", encoded(3), policy=UNSAMPLED, iteration=0, phase="predicting", score=False
    )
    assert reward.events == []
    assert [row.reward for row in rows] == [None] * 3
    scored = collector(reward=reward).collect_greedy(
        store, "greedy", encoded(3), policy=UNSAMPLED, iteration=0, phase="evaluating"
    )
    assert [row.reward for row in scored] == [0.0] * 3


# ---------------------------------------------------------- reports and bad engines


def test_every_prompt_is_reported(store: ShardStore) -> None:
    """Four tokens a response, two responses a prompt, three prompts in shards of two."""
    seen: list[PhaseProgress] = []
    collect(store, wanted_of(3), report=seen.append)
    assert seen == [
        PhaseProgress("probing", 3, 0, 3, 0),
        PhaseProgress("probing", 3, 1, 3, 8),
        PhaseProgress("probing", 3, 2, 3, 16),
        PhaseProgress("probing", 3, 3, 3, 24),
        PhaseProgress("scoring", 3, 0, 3, 0),
        PhaseProgress("scoring", 3, 2, 3, 16),
        PhaseProgress("scoring", 3, 3, 3, 24),
    ]
    seen.clear()
    collect(store, wanted_of(3), report=seen.append)
    assert seen == []


def test_a_batch_is_reported_while_it_is_sampled(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an engine that says how far it is; never as many prompts as the phase has, before they are there."""

    class Telling(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            assert self.on_batch_progress is not None
            for share in (0.5, 1.0):
                self.on_batch_progress(share * len(requests), 3)
            yield from super().generate(requests)

    monkeypatch.setattr("sppo_lightning.rollouts.sampling.SECONDS_BETWEEN_REPORTS", 0.0)
    seen: list[PhaseProgress] = []
    generator = Telling()
    collect(store, wanted_of(3), report=seen.append, generator=generator)
    assert [progress for progress in seen if progress.under_way] == [
        PhaseProgress("probing", 3, 0, 3, 3, 1.0),
        PhaseProgress("probing", 3, 0, 3, 3, 2.0),
        PhaseProgress("probing", 3, 2, 3, 19, 0.5),
    ]
    assert generator.on_batch_progress is None


def test_an_engine_that_forgets_a_prompt(store: ShardStore) -> None:
    class Forgetful(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            yield from list(super().generate(requests))[:1]

    message = (
        r"^data\.generator Forgetful left 1 of 2 prompts without a response: it must answer every request$"
    )
    with pytest.raises(UserError, match=message):
        collect(store, wanted_of(2), generator=Forgetful())
    assert not store.folder.exists()


def test_an_engine_that_gives_too_few_responses(store: ShardStore) -> None:
    class Stingy(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for answer in super().generate(requests):
                yield answer._replace(responses=answer.responses[:1])

    with pytest.raises(ValueError, match="shorter"):
        collect(store, wanted_of(2), generator=Stingy())
    assert not store.folder.exists()


def test_a_reward_sees_each_responses_own_prompt(store: ShardStore) -> None:
    class Recorder(Digits):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            seen.extend(zip([prompt.id for prompt in prompts], responses, strict=True))
            return super().score(prompts, responses)

    seen: list[tuple[str, str]] = []
    rows = collect(store, wanted_of(5), reward=Recorder())
    assert seen == [(row.prompt_id, row.response) for row in rows]


def row_of(prompt_id: str, index: int) -> Rollout:
    return Rollout(prompt_id, index, "", "", (1,), "stop", None)


def test_by_prompt() -> None:
    rows = [row_of("b", 0), row_of("b", 1), row_of("a", 0)]
    assert list(by_prompt(rows)) == [("b", rows[:2]), ("a", rows[2:])]
    assert list(by_prompt([])) == []


def test_merged_joins_sources_that_lack_some_prompts() -> None:
    first = [row_of("a", 0), row_of("a", 1), row_of("c", 0)]
    second = [row_of("b", 5), row_of("c", 6)]
    found = merged("abcd", by_prompt(first), by_prompt(second))
    assert list(found) == [("a", first[:2]), ("b", second[:1]), ("c", [first[2], second[1]])]


def test_merged_refuses_a_source_in_another_order() -> None:
    with pytest.raises(AssertionError, match="order of prompt_ids"):
        list(merged("ab", by_prompt([row_of("b", 0), row_of("a", 0)])))


def test_merged_holds_one_prompt_of_a_source_at_a_time() -> None:
    taken: list[str] = []

    def source() -> Iterator[tuple[str, list[Rollout]]]:
        for prompt_id in "abc":
            taken.append(prompt_id)
            yield prompt_id, [row_of(prompt_id, 0)]

    stream = merged("abc", source())
    next(stream)
    assert taken == ["a", "b"]


def test_messages_reach_the_reward(store: ShardStore) -> None:
    """The prompt that is scored is the one that was read, with all its turns."""
    turns = (Message(role="system", content="be kind"), Message(role="user", content="hi"))
    prompt = EncodedPrompt(Prompt("p0", "hi", turns, answer="yes", metadata={"level": 1}), (1, 2))
    seen: list[Prompt] = []

    class Recorder(Digits):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            seen.extend(prompts)
            return [1.0] * len(responses)

    collect(store, [RolloutRequest(prompt, range(2))], reward=Recorder())
    assert seen == [prompt.prompt] * 2


# ---------------------------------------------------------------- what is held


@dataclass
class Made(Sequence[EncodedPrompt]):
    """Prompts that are made when they are asked for, and remembered weakly."""

    numbers: range
    made: list[weakref.ref[Prompt]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return Made(self.numbers[row], self.made)
        (found,) = encoded(1, self.numbers[row])
        self.made.append(weakref.ref(found.prompt))
        return found

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.made)


def test_prompts_of_one_shard_are_held_at_a_time(store: ShardStore) -> None:
    """Two in a shard, one more from the loop before; twenty in all."""

    class Sampling(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            alive.append(prompts.alive())
            yield from super().generate(requests)

    class Scoring(Digits):
        def score(self, asked: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            alive.append(prompts.alive())
            return super().score(asked, responses)

    alive: list[int] = []
    prompts = Made(range(20))
    rows = collect(
        store,
        RolloutRequests(prompts, [range(2)] * 20),
        generator=Sampling(),
        reward=Scoring(),
        prompts_per_shard=2,
    )
    assert len(alive) == 20
    assert max(alive) <= 4
    assert len(prompts.made) == 40  # each once to be asked, once to be scored
    alive.clear()
    greedy = collector(Sampling(), Scoring())
    greedy.collect_greedy(store, "greedy", prompts, policy=UNSAMPLED, iteration=0, phase="evaluating")
    assert len(alive) == 20
    assert max(alive) <= 4
    assert same(rows, collect(ShardStore(store.folder / "plain"), wanted_of(20)))


def test_wanted_rows_are_those_of_a_list() -> None:
    samples = [range(2), range(1, 4), range(1)]
    rows, plain = RolloutRequests(encoded(3), samples), list(map(RolloutRequest, encoded(3), samples))
    assert len(rows) == 3
    assert list(rows) == plain
    assert rows[-1] == plain[-1]
    assert list(rows[1:]) == plain[1:]
    assert list(rows[1:][1:]) == plain[2:]
    with pytest.raises(IndexError):
        rows[3]


# ---------------------------------------------------------------- overlapping shards


class Streaming(Echo):
    """An engine that holds back each shard's first prompt until it has been asked for the next one's."""

    streams = True

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        self.calls += 1
        held: list[PromptResponses] = []
        for number, request in enumerate(requests):
            self.asked.append(request)
            answer = PromptResponses(
                number, [self.response(request.token_ids, seed) for seed in request.seeds or (0,)]
            )
            if number % 2:
                yield answer
            else:
                yield from held
                held = [answer]
        yield from held


def test_an_engine_that_streams_is_asked_for_all_shards_at_once(tmp_path: Path) -> None:
    engine, seen = Streaming(), ShardStore(tmp_path / "a")
    written: list[tuple[int, list[str]]] = []

    def report(progress: PhaseProgress) -> None:
        if progress.phase == "probing":
            written.append((progress.done, list(files(seen)) if seen.folder.exists() else []))

    found = collect(seen, wanted_of(5), generator=engine, report=report, prompts_per_shard=2)
    assert same(found, collect(ShardStore(tmp_path / "b"), wanted_of(5), prompts_per_shard=2))
    assert engine.calls == 1
    # a shard is on disk as soon as it is complete, while later ones are asked for
    assert written[-1] == (5, ["probe-00000.parquet", "probe-00001.parquet"])
    assert (3, ["probe-00000.parquet"]) in written


def test_a_stream_behind_kept_responses_is_asked_for_what_is_missing_of_all_shards(tmp_path: Path) -> None:
    """Of the second run, some prompts of each shard are known."""
    plain = collect(ShardStore(tmp_path / "plain"), wanted_of(5), prompts_per_shard=2)
    engines = [with_settings(Streaming()) for _ in range(2)]
    kept = [CachedGenerator(engine, str(tmp_path / "kept")) for engine in engines]
    collect(ShardStore(tmp_path / "a"), wanted_of(5)[::2], generator=kept[0], prompts_per_shard=2)
    assert same(
        collect(ShardStore(tmp_path / "b"), wanted_of(5), generator=kept[1], prompts_per_shard=2), plain
    )
    assert [(engine.calls, len(engine.asked)) for engine in engines] == [(1, 3), (1, 2)]


def test_finished_shards_of_a_stream_that_breaks_off_are_kept(store: ShardStore) -> None:
    class Breaking(Streaming):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for answer in super().generate(requests):
                yield answer
                if answer.request == 3:
                    raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        collect(store, wanted_of(5), generator=Breaking(), prompts_per_shard=2)
    assert list(files(store)) == ["probe-00000.parquet"]
    engine = Streaming()
    collect(store, wanted_of(5), generator=engine, prompts_per_shard=2)
    assert len(engine.asked) == 3


def test_a_stream_that_forgets_a_prompt(store: ShardStore) -> None:
    class Forgetful(Streaming):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            yield from (answer for answer in super().generate(requests) if answer.request != 2)

    with pytest.raises(UserError, match=r"Forgetful left 1 of 5 prompts without a response"):
        collect(store, wanted_of(5), generator=Forgetful(), prompts_per_shard=2)
