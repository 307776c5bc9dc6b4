"""Tournaments between a prompt's responses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from sppo_lightning.rewards.pairwise import (
    Comparison,
    FunctionJudge,
    Judge,
    PairwiseReward,
    drawn_opponents,
    presented,
)
from sppo_lightning.rewards.protocol import Reward, Scores, checked_scores
from sppo_lightning.types import Message, Prompt, UserError

TEXTS = st.lists(st.text("abc", max_size=3), min_size=2, max_size=6)


def prompt_of(name: str = "p") -> Prompt:
    return Prompt(name, f"text of {name}", (Message(role="user", content=f"text of {name}"),))


class TableJudge(Judge):
    """Knows P(first beats second) of some pairs, whichever comes first, and remembers what it was asked."""

    def __init__(self, table: dict[tuple[str, str], Any]) -> None:
        self.table = table
        self.asked: list[list[Comparison]] = []

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        self.asked.append(list(comparisons))
        return [
            self.table[first, second] if (first, second) in self.table else 1 - self.table[second, first]
            for _, first, second in comparisons
        ]

    def pairs(self) -> list[tuple[str, frozenset[str]]]:
        return [(prompt.id, frozenset((a, b))) for call in self.asked for prompt, a, b in call]


def tournament(judge: Judge, responses: Sequence[str], **options: Any) -> Scores:
    return PairwiseReward(judge, **options).score([prompt_of()] * len(responses), responses)


def longer(prompt: str, first: str, second: str) -> float:
    """P that grows with the difference of the lengths."""
    return 1 / (1 + math.exp(len(second) - len(first)))


def whimsical(prompt: str, first: str, second: str) -> float:
    """Any number in [0, 1] for a pair in an order; says nothing of the other order."""
    return hashlib.sha256(f"{prompt}/{first}/{second}".encode()).digest()[0] / 255


# --------------------------------------------------------------------- rewards


def test_rewards_golden() -> None:
    """The mean over two opponents: a (0.9 + 0.6) / 2, b (0.1 + 0.3) / 2, c (0.4 + 0.7) / 2."""
    judge = TableJudge({("a", "b"): 0.9, ("a", "c"): 0.6, ("b", "c"): 0.3})
    rewards, reasons, parts, _ = tournament(judge, ["a", "b", "c"])
    assert rewards == pytest.approx([0.75, 0.2, 0.55])
    assert reasons == {}
    assert parts == {"unjudged": [0, 0, 0]}


@given(TEXTS)
def test_rewards_of_a_full_tournament_sum_to_half_the_responses(responses: list[str]) -> None:
    """Each of n (n - 1) / 2 pairs gives 1 to share, and each mean divides by n - 1."""
    rewards, reasons, _, _ = tournament(FunctionJudge(longer), responses)
    assert math.fsum(rewards) == pytest.approx(len(responses) / 2)
    assert reasons == {}


@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_the_responses_changes_no_reward(responses: list[str], random: Any) -> None:
    """Not even under a judge that contradicts itself when the order of presentation changes."""
    order = random.sample(range(len(responses)), len(responses))
    rewards = tournament(FunctionJudge(whimsical), responses).rewards
    moved = tournament(FunctionJudge(whimsical), [responses[place] for place in order]).rewards
    assert moved == [rewards[place] for place in order]


def test_prompts_do_not_meet_and_need_not_be_neighbours() -> None:
    """One call of the judge for all; the same text under two prompts is two questions."""
    judge = TableJudge({("a", "b"): 1.0, ("a", "c"): 0.0})
    prompts = [prompt_of(name) for name in ("p", "q", "p", "q", "r")]
    rewards, reasons, parts, _ = PairwiseReward(judge).score(prompts, ["a", "a", "b", "c", "z"])
    assert rewards[:4] == [1, 0, 0, 1]
    assert math.isnan(rewards[4])
    assert math.isnan(parts["unjudged"][4])
    assert reasons == {4: "no_opponent"}
    assert len(judge.asked) == 1
    assert sorted(judge.pairs(), key=lambda pair: pair[0]) == [("p", frozenset("ab")), ("q", frozenset("ac"))]


def test_identical_texts_tie_unasked() -> None:
    """a beats b (1) and ties with its twin (1/2); b loses to both, and is asked about once."""
    judge = TableJudge({("a", "b"): 1.0})
    assert tournament(judge, ["a", "a", "b"]).rewards == [0.75, 0.75, 0]
    assert judge.pairs() == [("p", frozenset("ab"))]
    silent = TableJudge({})
    assert tournament(silent, ["a", "a"]).rewards == [0.5, 0.5]
    assert silent.asked == []


@given(TEXTS, st.none() | st.integers(1, 6))
def test_no_pair_is_asked_twice(responses: list[str], opponents: int | None) -> None:
    asked: list[frozenset[str]] = []

    def remember(prompt: str, first: str, second: str) -> float:
        asked.append(frozenset((first, second)))
        return 0.5

    tournament(FunctionJudge(remember), responses, opponents=opponents)
    assert len(asked) == len(set(asked))
    assert all(len(pair) == 2 for pair in asked)


def test_the_order_of_presentation_is_mixed() -> None:
    shown = [presented(f"p{number}", "a", "b") for number in range(200)]
    assert 70 < shown.count(("a", "b")) < 130
    assert shown == [presented(f"p{number}", "b", "a") for number in range(200)]


# ------------------------------------------------------------------- opponents


def test_drawn_opponents() -> None:
    draws = [drawn_opponents(f"p{number}", 1, 5, 2) for number in range(300)]
    assert all(len(set(draw)) == 2 and 1 not in draw for draw in draws)
    assert {other for draw in draws for other in draw} == {0, 2, 3, 4}
    counts = [sum(other in draw for draw in draws) for other in (0, 2, 3, 4)]
    assert all(110 < count < 190 for count in counts)  # 150 on average
    assert drawn_opponents("p7", 1, 5, 2) == draws[7]
    assert drawn_opponents("p", 1, 4, None) == drawn_opponents("p", 1, 4, 3) == [0, 2, 3]


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.text(max_size=5))
def test_a_sampled_tournament(count: int, opponents: int, name: str) -> None:
    """Everybody meets whom it drew and who drew it, and a judge of strengths gives the mean over them."""
    responses = ["x" * length for length in range(count)]
    met: list[set[int]] = [set() for _ in responses]
    for row in range(count):
        for other in drawn_opponents(name, row, count, opponents):
            met[row].add(other)
            met[other].add(row)
    reward = PairwiseReward(FunctionJudge(longer), opponents=opponents)
    rewards = reward.score([prompt_of(name)] * count, responses).rewards
    for row, others in enumerate(met):
        assert len(others) >= min(opponents, count - 1)
        wins = [longer("", responses[row], responses[other]) for other in others]
        assert rewards[row] == pytest.approx(sum(wins) / len(wins))


def test_a_sampled_tournament_asks_less() -> None:
    asked: list[str] = []

    def remember(prompt: str, first: str, second: str) -> float:
        asked.append(first)
        return 1.0

    tournament(FunctionJudge(remember), [str(number) for number in range(20)], opponents=2)
    assert 20 <= len(asked) <= 40  # of 190


def test_opponents_out_of_range() -> None:
    message = r"^PairwiseReward\.opponents=0 must be at least 1, or null for all others$"
    with pytest.raises(ValueError, match=message):
        PairwiseReward(FunctionJudge(longer), opponents=0)


# -------------------------------------------------------------------- failures


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_comparisons_that_the_judge_cannot_make_are_left_out(unknown: Any) -> None:
    """a and b each have one of two comparisons left, c both, d none."""
    judge = FunctionJudge(
        lambda prompt, first, second: (
            unknown if {first, second} == {"a", "b"} else longer(prompt, first, second)
        )
    )
    rewards, reasons, parts, _ = tournament(judge, ["a", "b", "cc"])
    win = longer("", "cc", "a")
    assert rewards == pytest.approx([1 - win, 1 - win, win])
    assert parts == {"unjudged": [0.5, 0.5, 0]}
    assert reasons == {}


def test_a_response_without_a_judgement_is_dropped_alone() -> None:
    def function(prompt: str, first: str, second: str) -> float:
        return math.nan if "?" in (first, second) else longer(prompt, first, second)

    prompts = [prompt_of("p")] * 3 + [prompt_of("q")]
    found = checked_scores(PairwiseReward(FunctionJudge(function)), prompts, ["?", "a", "bb", "c"])
    assert found.reasons == {0: "no_judgement", 3: "no_opponent"}
    assert [math.isfinite(reward) for reward in found.rewards] == [False, True, True, False]
    assert found.parts["unjudged"][:3] == [1, 0.5, 0.5]
    assert found.error is None


def test_a_judge_that_raises_drops_that_prompt_only() -> None:
    def function(prompt: str, first: str, second: str) -> float:
        if prompt == "text of q":
            raise KeyError("q")
        return longer(prompt, first, second)

    prompts = [prompt_of(name) for name in "ppqqrr"]
    found = checked_scores(PairwiseReward(FunctionJudge(function)), prompts, ["a", "bb"] * 3)
    assert found.reasons == {2: "failed_score", 3: "failed_score"}
    assert found.rewards[:2] == found.rewards[4:]
    assert found.error is not None
    assert "raised KeyError: 'q'" in found.error


@pytest.mark.parametrize("answer", [1.5, -0.1, math.inf, "0.5", [0.5]])
def test_a_judge_that_returns_no_probability(answer: Any) -> None:
    message = (
        r"^data\.reward judge FunctionJudge returned .*: it must return probabilities from 0 to 1, or NaN$"
    )
    with pytest.raises(UserError, match=message):
        tournament(FunctionJudge(lambda *_: answer), ["a", "b"])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([0.5], r"returned 1 answers to 3 comparisons: it must return one for each$"),
        ([0.5] * 4, r"returned 4 answers to 3 comparisons"),
        (0.5, r"returned a float: it must return a list of probabilities$"),
        (None, r"returned a NoneType: it must return a list"),
    ],
)
def test_a_judge_that_breaks_its_contract(answers: Any, message: str) -> None:
    class Broken(Judge):
        def compare(self, comparisons: Sequence[Comparison]) -> Sequence[float]:
            return answers  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=rf"^data\.reward judge Broken {message}"):
        tournament(Broken(), ["a", "b", "c"])


@pytest.mark.parametrize("answers", [torch.tensor([0.25]), (0.25,), iter([0.25])])
def test_whatever_holds_numbers_is_an_answer(answers: Any) -> None:
    class Odd(Judge):
        def compare(self, comparisons: Sequence[Comparison]) -> Sequence[float]:
            return answers  # type: ignore[no-any-return]

    assert sorted(tournament(Odd(), ["a", "b"]).rewards) == [0.25, 0.75]


# ---------------------------------------------------------------------- wiring


def test_the_judge_is_checked_loaded_and_unloaded() -> None:
    calls: list[str] = []

    class Watched(Judge):
        def check(self) -> None:
            calls.append("check")

        def check_prompts(self, prompts: Sequence[Prompt]) -> None:
            calls.append(f"check {len(prompts)} prompts")

        def load(self, device: torch.device) -> None:
            calls.append(f"load on {device}")

        def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
            return []

        def unload(self) -> None:
            calls.append("unload")

    reward = PairwiseReward(Watched())
    reward.check()
    reward.check_prompts([prompt_of()])
    reward.load(torch.device("cpu"))
    reward.unload()
    assert calls == ["check", "check 1 prompts", "load on cpu", "unload"]
    assert reward.comparative


def test_a_judge_needs_compare_and_nothing_else() -> None:
    reward = PairwiseReward(FunctionJudge(longer))
    reward.check()
    reward.check_prompts([prompt_of()])
    reward.load(torch.device("cpu"))
    reward.unload()


def test_from_a_config() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    config = {
        "class_path": "sppo_lightning.rewards.pairwise.PairwiseReward",
        "init_args": {
            "judge": {
                "class_path": "sppo_lightning.rewards.pairwise.FunctionJudge",
                "init_args": {"function": f"{__name__}.longer"},
            },
            "opponents": 2,
        },
    }
    reward = parser.instantiate(parser.parse_object({"reward": config})).reward
    assert isinstance(reward, PairwiseReward)
    assert reward.opponents == 2
    assert reward.score([prompt_of()] * 2, ["a", "a"]).rewards == [0.5, 0.5]
    typed = parser.parse_args(
        [
            "--reward=sppo_lightning.rewards.pairwise.PairwiseReward",
            "--reward.judge=sppo_lightning.rewards.pairwise.FunctionJudge",
            f"--reward.judge.function={__name__}.longer",
        ]
    )
    assert parser.instantiate(typed).reward.opponents is None
