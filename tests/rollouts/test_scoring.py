"""Rewards onto rollouts: who is dropped, why, and when a run stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import UNSAMPLED, Alone, Digits, Echo, collector, encoded, files, same, wanted_of

from sppo_lightning.generation import PromptResponses, SampleRequest
from sppo_lightning.rewards import FunctionReward, Reward
from sppo_lightning.rewards.protocol import Scores
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.rollouts.scoring import FailureWatch, ScoredRows, UnfinishedRule, score_rows
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import Prompt, Response, Rollout, UserError

PROMPTS = {name: Prompt(name, f"text {name}", ()) for name in "abc"}


def row(prompt_id: str, response: str, **fields: Any) -> Rollout:
    settings = {"sample_index": 0, "token_ids": (1, 2), "finish_reason": "stop", "reward": None, **fields}
    return Rollout(prompt_id=prompt_id, prompt="", response=response, **settings)


def failed(prompt_id: str, reason: str = "server_error") -> Rollout:
    return row(prompt_id, "", token_ids=(), finish_reason="failed", drop_reason=reason)


@dataclass
class Lengths(Reward):
    """Rewards a response's length, drops the rude ones, and keeps what it was asked."""

    asked: list[tuple[str, str]] = field(default_factory=list)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        self.asked += zip([prompt.id for prompt in prompts], responses, strict=True)
        return Scores(
            [float(len(response)) for response in responses],
            {number: "rude" for number, response in enumerate(responses) if response == "damn"},
            {"first": [float(ord(response[0])) for response in responses]},
        )


@dataclass
class Longer(Reward):
    """The share of a prompt's other responses that are shorter, a half for each as long; raises at one text."""

    broken: str = "none"
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def comparative(self) -> bool:
        return True

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        pairs = list(zip([prompt.id for prompt in prompts], responses, strict=True))
        if self.broken in responses:
            raise KeyError("level")
        self.asked += pairs
        wins = []
        for number, (prompt_id, text) in enumerate(pairs):
            others = [
                len(other) for place, (key, other) in enumerate(pairs) if key == prompt_id and place != number
            ]
            wins.append(sum((len(text) > one) + (len(text) == one) / 2 for one in others) / len(others))
        reasons = {number: "rude" for number, text in enumerate(responses) if text == "damn"}
        return Scores(wins, reasons, {"length": [float(len(text)) for text in responses]})


# ------------------------------------------------------------------------ rows


def test_rows_that_the_generator_failed_are_not_shown_to_the_reward() -> None:
    reward = Lengths()
    rows = [failed("a"), row("a", "one", sample_index=1), failed("b", "server_time_out"), row("c", "three")]
    found = score_rows(reward, rows, PROMPTS)
    assert reward.asked == [("a", "one"), ("c", "three")]
    expected = [
        replace(rows[0], reward=math.nan),
        replace(rows[1], reward=3.0, reward_parts={"first": float(ord("o"))}),
        replace(rows[2], reward=math.nan),
        replace(rows[3], reward=5.0, reward_parts={"first": float(ord("t"))}),
    ]
    assert same(found.rows, expected)
    assert found.error is None


def test_where_every_row_failed_the_reward_is_not_asked() -> None:
    """A reward that cannot take an empty list would hide the cause: its error is the one that is quoted."""
    mean = FunctionReward(lambda prompts, responses, metadata: [1 / len(responses)] * len(responses))
    rows = [failed("a"), failed("b")]
    found = score_rows(mean, rows, PROMPTS)
    assert same(found.rows, [replace(one, reward=math.nan) for one in rows])
    assert found.error is None


def test_reasons_and_parts_land_on_their_rows() -> None:
    rows = [failed("a"), row("a", "good"), row("a", "damn"), failed("b"), row("b", "hi"), row("c", "damn")]
    found = score_rows(Lengths(), rows, PROMPTS).rows
    assert [one.drop_reason for one in found] == ["server_error", None, "rude", "server_error", None, "rude"]
    assert [dict(one.reward_parts) for one in found] == [
        {},
        {"first": float(ord("g"))},
        {"first": float(ord("d"))},
        {},
        {"first": float(ord("h"))},
        {"first": float(ord("d"))},
    ]
    assert [one.usable for one in found] == [False, True, False, False, True, False]


def test_a_reward_of_no_number_has_a_reason() -> None:
    reward = FunctionReward(lambda prompts, responses, metadata: [1.0, math.inf, math.nan])
    found = score_rows(reward, [row("a", "x"), row("a", "y"), row("b", "z")], PROMPTS).rows
    assert [one.drop_reason for one in found] == [None, "non_finite_reward", "non_finite_reward"]


def test_what_is_scored_is_otherwise_as_it_was() -> None:
    rows = [row("a", "one", sample_index=4, token_ids=(7, 8, 9), finish_reason="length")]
    (found,) = score_rows(Lengths(), rows, PROMPTS).rows
    assert replace(found, reward=None, reward_parts={}) == rows[0]


# ------------------------------------------------------------ win probabilities


class Winning(Reward):
    """Its rewards are win probabilities."""

    gives_win_probabilities = True

    def __init__(self, *shares: float) -> None:
        self.shares = shares

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        return Scores(list(self.shares))


class Charged(Winning):
    """Its rewards are none, but it gives some beside."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        return Scores([7.0] * len(responses), {}, {"win_probability": self.shares})


@pytest.mark.parametrize(("kind", "lowered"), [(Winning, 0.5), (Charged, 6.5)])
def test_a_reward_that_gives_win_probabilities_leaves_them_among_the_parts(
    kind: type[Winning], lowered: float
) -> None:
    """Also where the reward itself is lowered after."""
    cut = [row("a", text, finish_reason="length") for text in "xyz"]
    scored = score_rows(kind(0.25, math.nan, 1.0), cut, PROMPTS).rows
    found = [UnfinishedRule("penalise", 0.5).apply(one) for one in scored]
    shares = [one.reward_parts["win_probability"] for one in found]
    assert shares == pytest.approx([0.25, math.nan, 1], nan_ok=True)
    assert found[2].reward == lowered


def test_other_rewards_have_no_such_part() -> None:
    (found,) = score_rows(Lengths(), [row("a", "x")], PROMPTS).rows
    assert "win_probability" not in found.reward_parts


@pytest.mark.parametrize("kind", [Winning, Charged])
def test_a_win_probability_that_is_none_is_refused(kind: type[Winning]) -> None:
    message = (
        rf"^data\.reward {kind.__name__} gave 1\.5 as a win probability: one lies in \[0, 1\]; set gives_win_"
    )
    with pytest.raises(UserError, match=message):
        score_rows(kind(0.5, 1.5), [row("a", "x"), row("a", "y")], PROMPTS)


# ---------------------------------------------------------- comparative rewards


def test_a_comparative_reward_compares_the_answers_that_came_back() -> None:
    """Lengths 3, 1, 2 of one prompt: 3 beats both, 2 beats one of two; the failed row takes no part."""
    reward = Longer()
    rows = [row("a", "xxx"), row("a", "x"), failed("a"), row("a", "xx")]
    found = score_rows(reward, rows, PROMPTS).rows
    assert reward.asked == [("a", "xxx"), ("a", "x"), ("a", "xx")]
    assert [one.reward for one in found[:2] + found[3:]] == [1.0, 0.0, 0.5]
    assert found[2].drop_reason == "server_error"


def test_an_answer_is_compared_with_its_opponent_or_with_itself() -> None:
    reward = Longer()
    rows = [row("a", "xxx"), row("b", "y"), row("c", "zz")]
    found = score_rows(reward, rows, PROMPTS, opponents={"a": "xx", "c": "zzzz"}).rows
    assert reward.asked == [
        *(("a", "xxx"), ("a", "xx")),
        *(("b", "y"), ("b", "y")),
        *(("c", "zz"), ("c", "zzzz")),
    ]
    assert [one.reward for one in found] == [1.0, 0.5, 0.0]
    assert [dict(one.reward_parts) for one in found] == [{"length": 3.0}, {"length": 1.0}, {"length": 2.0}]


def test_an_opponents_reasons_are_not_the_answers() -> None:
    rows = [failed("a"), row("b", "damn"), row("c", "zz")]
    found = score_rows(Longer(), rows, PROMPTS, opponents={"a": "x", "b": "y", "c": "damn"}).rows
    assert [one.drop_reason for one in found] == ["server_error", "rude", None]
    assert found[2].reward == 0.0


def test_an_opponent_that_cannot_be_read_costs_its_own_prompt_only() -> None:
    rows = [row("a", "xxx"), row("b", "yy")]
    found = score_rows(Longer(broken="bad"), rows, PROMPTS, opponents={"a": "bad"})
    assert [one.drop_reason for one in found.rows] == ["failed_score", None]
    assert found.rows[1].reward == 0.5
    assert found.error is not None
    assert "raised KeyError: 'level'" in found.error


def test_opponents_are_nothing_to_a_reward_that_compares_nothing() -> None:
    reward = Lengths()
    score_rows(reward, [row("a", "xxx"), row("b", "y")], PROMPTS, opponents={"a": "x"})
    assert reward.asked == [("a", "xxx"), ("b", "y")]


# ------------------------------------------------------------------ unfinished


SCORED = row("a", "x", finish_reason="length", reward=2.0, reward_parts={"style": 1.0})
OTHERS = [
    replace(SCORED, finish_reason="stop"),
    replace(SCORED, reward=math.nan, drop_reason="failed_score"),
    replace(failed("a"), reward=math.nan),
]


def test_an_unfinished_response_is_kept_dropped_or_penalised() -> None:
    assert UnfinishedRule().apply(SCORED) is SCORED
    assert UnfinishedRule("drop").apply(SCORED) == replace(SCORED, drop_reason="unfinished")
    assert UnfinishedRule("penalise", 0.5).apply(SCORED) == replace(
        SCORED, reward=1.5, reward_parts={"style": 1.0, "unfinished_penalty": 0.5}
    )


@pytest.mark.parametrize("rule", [UnfinishedRule("drop"), UnfinishedRule("penalise", 0.5)])
@pytest.mark.parametrize("other", OTHERS, ids=["finished", "dropped already", "failed"])
def test_other_responses_keep_their_rewards(rule: UnfinishedRule, other: Rollout) -> None:
    """A penalty of 0 is a part of those that take part, so that the parts' means add up."""
    found = rule.apply(other)
    parts = dict(other.reward_parts)
    if rule.penalty is not None and other.drop_reason is None:
        parts["unfinished_penalty"] = 0.0
    assert found == replace(other, reward_parts=parts)


@pytest.mark.parametrize(
    ("rule", "penalty", "message"),
    [
        (
            "keep",
            0.5,
            r"unfinished=keep with data\.unfinished_penalty=0\.5: a penalty goes with penalise, and",
        ),
        (
            "drop",
            0.5,
            r"unfinished=drop with data\.unfinished_penalty=0\.5: a penalty goes with penalise, and",
        ),
        (
            "penalise",
            None,
            r"unfinished=penalise with data\.unfinished_penalty=None: a penalty goes with pena",
        ),
        ("penalise", 0.0, r"unfinished_penalty=0\.0 must be greater than 0$"),
        ("penalise", -1.0, r"unfinished_penalty=-1\.0 must be greater than 0$"),
        ("penalise", math.inf, r"unfinished_penalty=inf must be greater than 0$"),
        ("penalise", math.nan, r"unfinished_penalty=nan must be greater than 0$"),
    ],
)
def test_rules_that_make_no_sense(rule: Any, penalty: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{message}"):
        UnfinishedRule(rule, penalty)


# ---------------------------------------------------------------- failure watch


def rows_of(*reasons: str | None, error: str | None = None) -> ScoredRows:
    return ScoredRows([row("a", "x", reward=1.0, drop_reason=reason) for reason in reasons], error)


def stopped(watch: FailureWatch, *reasons: str | None) -> bool:
    try:
        watch.add(rows_of(*reasons))
    except UserError:
        return True
    return False


def test_a_few_responses_say_nothing_about_a_phase_with_more_to_come() -> None:
    """A tenth of the phase may fail, at its beginning too; but 64 failures and nothing else is a broken server."""
    watch = FailureWatch(0.1, total=1000)
    assert not stopped(watch, *["failed_score"] * 63)
    assert stopped(watch, "failed_score")
    watch = FailureWatch(0.1, total=1000)
    assert not stopped(watch, None, *["failed_score"] * 100)
    assert stopped(watch, "failed_score")


def test_a_small_phase_is_judged_by_its_own_size() -> None:
    assert not stopped(FailureWatch(0.5, total=4), "failed_score", "failed_score")
    assert stopped(FailureWatch(0.5, total=4), "failed_score", "failed_score", "failed_score")


def test_the_share_is_that_of_the_whole_phase() -> None:
    watch = FailureWatch(0.5, total=1000)
    assert not stopped(watch, *["failed_score"] * 32)
    assert not stopped(watch, None)
    assert not stopped(watch, *["failed_score"] * 468)
    assert stopped(watch, "failed_score")


def test_share_0_takes_no_failure_and_share_1_takes_all() -> None:
    assert not stopped(FailureWatch(0.0, total=1000), *[None] * 5)
    assert stopped(FailureWatch(0.0, total=1000), *[None] * 5, "failed_score")
    assert not stopped(FailureWatch(1.0, total=3), *["failed_score"] * 3)
    assert not stopped(FailureWatch(1.0, total=1000), *["failed_score"] * 1000)


def test_unfinished_responses_are_no_failures() -> None:
    watch = FailureWatch(0.0, total=10)
    assert not stopped(watch, *["unfinished"] * 10)
    assert stopped(watch, "too_long_to_score")


def test_what_was_scored_before_counts_and_stops_nothing_by_itself() -> None:
    watch = FailureWatch(0.5, total=100)
    watch.remember(60, ["failed_score"] * 50 + ["unfinished"] * 10)
    assert not stopped(watch, *[None] * 40)
    assert stopped(watch, "failed_score")


def test_the_error_counts_the_reasons_and_quotes_the_first_error() -> None:
    watch = FailureWatch(0.1, total=60)
    watch.add(rows_of(None, "failed_score"))
    watch.add(rows_of("failed_score", None, error="data.reward R raised E: one"))
    watch.add(rows_of("unfinished", "non_finite_reward", error="data.reward R raised E: two"))
    with pytest.raises(UserError) as error:
        watch.add(rows_of(*["failed_score"] * 4))
    assert str(error.value) == (
        "7 of 10 responses are of no use (6 failed_score, 1 unfinished, 1 non_finite_reward), over "
        "data.max_failed_share=0.1; the first error: data.reward R raised E: one: correct the cause, or allow a "
        "larger share"
    )


def test_the_error_without_an_error_of_the_reward() -> None:
    with pytest.raises(UserError) as error:
        FailureWatch(0.25, total=2).add(rows_of("too_long_to_score", None))
    assert str(error.value) == (
        "1 of 2 responses are of no use (1 too_long_to_score), over data.max_failed_share=0.25: correct the cause, "
        "or allow a larger share"
    )


# ------------------------------------------------------------------- collecting


class Fragile(Digits):
    """Raises wherever the response with this seed is among the others."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.calls += 1
        if self.at in responses:
            raise RuntimeError("no such word")
        return [float(len(response)) for response in responses]


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "rollouts")


def collected(store: ShardStore, setting: Collector, count: int = 3) -> list[Rollout]:
    setting.collect(store, "probe", wanted_of(count), policy=UNSAMPLED, iteration=3, phase="probing")
    return list(store.read_all("probe"))


def test_a_response_that_the_reward_cannot_score_is_dropped_alone_and_stored_so(tmp_path: Path) -> None:
    sampled = collected(ShardStore(tmp_path / "plain"), collector())
    store = ShardStore(tmp_path / "fragile")
    reward = Fragile(sampled[3].response)
    rows = collected(store, collector(reward=reward))
    expected = [replace(one, reward=float(len(one.response)), drop_reason=None) for one in sampled]
    expected[3] = replace(expected[3], reward=math.nan, drop_reason="failed_score")
    assert same(rows, expected)
    before = files(store)
    generator, reward = Echo(), Fragile("nothing")
    assert same(collected(store, collector(generator, reward)), expected)
    assert generator.events == []
    assert reward.calls == 0
    assert files(store) == before


class Failing(Echo):
    """A third of the answers never come back."""

    def response(self, prompt: tuple[int, ...], seed: int) -> Response:
        if seed % 3 == 0:
            return Response((), "", "failed", "server_error")
        return super().response(prompt, seed)


def test_answers_that_never_came_back_are_stored_with_their_reason_and_not_asked_again(
    store: ShardStore,
) -> None:
    reward = Lengths()
    rows = collected(store, collector(Failing(), reward), count=12)
    lost = [one for one in rows if one.finish_reason == "failed"]
    assert 0 < len(lost) < len(rows)
    assert {one.drop_reason for one in lost} == {"server_error"}
    assert all(one.reward is not None and math.isnan(one.reward) for one in lost)
    assert len(reward.asked) == len(rows) - len(lost)
    generator = Failing()
    assert same(collected(store, collector(generator, reward), count=12), rows)
    assert generator.calls == 0


def test_too_many_failures_stop_the_run_which_goes_on_where_it_was(store: ShardStore) -> None:
    """Shards of two prompts: the second of them has the one response too many."""
    sampled = list(collected(ShardStore(store.folder / "plain"), collector()))
    fragile = Fragile(sampled[4].response)
    message = (
        r"^1 of 6 responses are of no use \(1 failed_score\), over data\.max_failed_share=0; the first error: "
        r"data\.reward Fragile raised RuntimeError: no such word \(.*, in score\): correct the cause, or allow a "
    )
    with pytest.raises(UserError, match=message):
        collected(store, replace(collector(reward=fragile), max_failed_share=0.0))
    kept = [store.key("probe", number) for number in range(2)]
    assert [key.scored for key in kept if key is not None] == [True, False]
    generator = Echo()
    rows = collected(store, replace(collector(generator, fragile), max_failed_share=0.5))
    assert generator.calls == 0
    assert [one.drop_reason for one in rows] == [None] * 4 + ["failed_score", None]


def test_a_run_that_goes_on_is_judged_as_the_whole_phase(tmp_path: Path) -> None:
    """One failure in 80 responses is no matter, also where the last four alone are left to score."""
    whole, broken = ShardStore(tmp_path / "whole"), ShardStore(tmp_path / "broken")
    sampled = collected(ShardStore(tmp_path / "plain"), collector(reward=Lengths()), count=40)
    fragile = Fragile(sampled[-1].response)
    expected = collected(whole, replace(collector(reward=fragile), max_failed_share=0.1), count=40)
    assert expected[-1].drop_reason == "failed_score"
    with pytest.raises(KeyboardInterrupt):
        collected(broken, collector(reward=Digits(fail_at=19)), count=40)
    setting = replace(collector(reward=fragile), max_failed_share=0.1)
    assert collected(broken, setting, count=40)[-1].drop_reason == "failed_score"


class Numberless(Lengths):
    """Scores the responses whose seed is a multiple of ten only; gives up at one call."""

    def __init__(self, at: int = -1) -> None:
        super().__init__()
        self.at = at
        self.calls = 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise KeyboardInterrupt
        return Scores([1.0 if response[-1] == "0" else math.nan for response in responses])


def test_failures_before_a_break_count_after_it(store: ShardStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        collected(store, replace(collector(reward=Numberless(at=19)), max_failed_share=1.0), count=40)
    before = [one for one in store.read_all("probe") if one.reward is not None]
    lost = sum(one.drop_reason == "non_finite_reward" for one in before)
    assert len(before) == 76
    assert lost > 40
    message = rf"^{lost} of 80 responses are of no use \({lost} non_finite_reward\), over"
    with pytest.raises(UserError, match=message):
        collected(store, replace(collector(reward=Lengths()), max_failed_share=0.5), count=40)


@pytest.mark.parametrize("rule", [UnfinishedRule("drop"), UnfinishedRule("penalise", 0.25)])
def test_unfinished_responses_are_stored_as_the_rule_says(tmp_path: Path, rule: UnfinishedRule) -> None:
    """No share of them is a failure."""
    plain = collected(ShardStore(tmp_path / "plain"), collector(reward=Lengths()), count=8)
    setting = replace(collector(reward=Lengths()), unfinished=rule, max_failed_share=0.0)
    found = collected(ShardStore(tmp_path / "ruled"), setting, count=8)
    assert {one.finish_reason for one in plain} == {"stop", "length"}
    assert same(found, [rule.apply(one) for one in plain])
    assert found != plain


@pytest.mark.parametrize("rule", [UnfinishedRule("drop"), UnfinishedRule("penalise", 0.25)])
def test_held_out_answers_are_never_dropped_as_unfinished(store: ShardStore, rule: UnfinishedRule) -> None:
    setting = replace(collector(reward=Lengths()), unfinished=rule)
    rows = setting.collect_greedy(
        store, "greedy", encoded(3), policy=UNSAMPLED, iteration=0, phase="evaluating"
    )
    assert {one.finish_reason for one in rows} == {"length"}
    assert all(one.usable for one in rows)
    assert [one.reward for one in rows] == [float(len(one.response)) for one in rows]
    assert all("unfinished_penalty" not in one.reward_parts for one in rows)


def test_held_out_answers_meet_their_opponents(store: ShardStore) -> None:
    """A longer, a shorter, and none: itself."""

    class Wordy(Echo):
        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for number, _ in enumerate(requests):
                yield PromptResponses(number, [Response((1,), "four", "stop")])

    rows = collector(Wordy(), Longer()).collect_greedy(
        store,
        "greedy",
        encoded(3),
        policy=UNSAMPLED,
        iteration=0,
        phase="evaluating",
        opponents={"p0": "longer", "p1": "x"},
    )
    assert [one.reward for one in rows] == [0.0, 1.0, 0.5]


def test_sampled_answers_meet_each_other(store: ShardStore) -> None:
    """Two responses to a prompt: one of them wins, or both tie."""
    rows = collected(store, collector(reward=Longer()), count=4)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        longer = len(first.response) - len(second.response)
        assert first.reward == (0.5 if longer == 0 else float(longer > 0))
        assert second.reward == 1 - first.reward


# ------------------------------------------------------------- an engine that fails


class Unreachable(Echo):
    """An engine whose server is down until it is mended."""

    down = True

    def response(self, prompt: tuple[int, ...], seed: int) -> Response:
        if self.down:
            return Response((), "", "failed", drop_reason="server_time_out")
        return super().response(prompt, seed)


def test_responses_that_an_engine_failed_are_asked_for_again(store: ShardStore) -> None:
    """Too many failures end the phase before they are stored, so that the cause can be mended."""
    engine = Unreachable()
    message = r"^8 of 8 responses are of no use \(8 server_time_out\), over data\.max_failed_share=0\.5"
    with pytest.raises(UserError, match=message):
        collected(store, collector(generator=engine, reward=Lengths()), count=6)
    assert not list(store.folder.iterdir())
    engine.down = False
    found = collected(store, collector(generator=engine, reward=Lengths()), count=6)
    assert all(row.usable for row in found)


class Leaving(Alone):
    """A process that learns at a barrier that another one failed."""

    def __init__(self, at: str) -> None:
        self.at = at

    def barrier(self, name: str) -> None:
        if name.startswith(self.at):
            raise UserError("process 1 failed: its server is gone")


class Patchy(Echo):
    """One response of the second prompt fails."""

    def response(self, prompt: tuple[int, ...], seed: int) -> Response:
        found = super().response(prompt, seed)
        return Response((), "", "failed", "server_time_out") if prompt[-1] == 2 else found


def test_failures_are_taken_back_where_another_process_ends_the_phase(store: ShardStore) -> None:
    """Else whose shards they are would decide whether they are asked for again."""
    with pytest.raises(UserError, match="process 1 failed"):
        collected(store, collector(generator=Patchy(), reward=Lengths(), ranks=Leaving("generated")), count=6)
    assert [path.name for path in sorted(store.folder.iterdir())] == [
        "probe-00001.parquet",
        "probe-00002.parquet",
    ]


def test_scores_that_failed_are_taken_back_too(store: ShardStore) -> None:
    rows = collected(store, collector(reward=Digits()), count=6)
    for number in range(3):
        unscored = [replace(row, reward=None, reward_parts={}) for row in store.read("probe", number) or []]
        store.write("probe", number, unscored)
    with pytest.raises(UserError, match="process 1 failed"):
        collected(store, collector(reward=Fragile(rows[0].response), ranks=Leaving("scored")), count=6)
    scored = [all(row.reward is not None for row in store.read("probe", number) or []) for number in range(3)]
    assert scored == [False, True, True]
    assert collected(store, collector(reward=Digits()), count=6)[:4] == rows[:4]
