"""Rewards made of other rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from sppo_lightning.rewards import FunctionReward, Reward
from sppo_lightning.rewards.combined import CombinedReward
from sppo_lightning.rewards.length import LengthPenalty
from sppo_lightning.rewards.pairwise import FunctionJudge, PairwiseReward
from sppo_lightning.rewards.protocol import Scores, checked_scores
from sppo_lightning.types import Message, Prompt, UserError

PROMPTS = [Prompt(name, name, (Message(role="user", content=name),)) for name in ("p", "p", "q")]
TEXTS = ["ab", "abcd", ""]


class Fixed(Reward):
    """Gives what it was told to, and remembers what was done to it."""

    def __init__(self, *found: Any, name: str = "", log: list[str] | None = None) -> None:
        self.found = found
        self.name = name
        self.log = [] if log is None else log

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float] | Scores:
        return self.found[0] if isinstance(self.found[0], Scores) else list(self.found)

    def check(self) -> None:
        self.log.append(f"check {self.name}")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.log.append(f"check prompts {self.name}")

    def load(self, device: torch.device) -> None:
        self.log.append(f"load {self.name} on {device}")

    def unload(self) -> None:
        self.log.append(f"unload {self.name}")


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(response)) for response in responses]


# -------------------------------------------------------------------- combined


def test_a_weighted_sum() -> None:
    """2 * 1 - 0.5 * 4 = 0, and so on; the parts are logged without their weights."""
    reward = CombinedReward({"a": Fixed(1, 2, 3), "b": Fixed(4, 0, 2)}, {"a": 2.0, "b": -0.5})
    rewards, reasons, parts, _ = reward.score(PROMPTS, TEXTS)
    assert rewards == [0, 4, 5]
    assert reasons == {}
    assert parts == {"a": [1, 2, 3], "b": [4, 0, 2]}


@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 4), min_size=1, max_size=5))
def test_the_sum_is_linear(columns: list[tuple[float, float, float, float]]) -> None:
    parts: dict[str, Reward] = {str(number): Fixed(*column[:3]) for number, column in enumerate(columns)}
    weights = {str(number): column[3] for number, column in enumerate(columns)}
    if not any(weights.values()):
        return
    expected = [sum(column[3] * column[row] for column in columns) for row in range(3)]
    assert CombinedReward(parts, weights).score(PROMPTS, TEXTS).rewards == pytest.approx(expected)


def test_parts_of_a_part_are_logged_under_both_names() -> None:
    inner = Scores([1, 2, 3], parts={"raw": [10, 20, 30]})
    outer = CombinedReward(
        {"a": Fixed(inner), "b": CombinedReward({"c": Fixed(1, 1, 1)}, {"c": 3.0})}, {"a": 1.0, "b": 1.0}
    )
    rewards, _, parts, _ = outer.score(PROMPTS, TEXTS)
    assert rewards == [4, 5, 6]
    assert parts == {"a": [1, 2, 3], "a/raw": [10, 20, 30], "b": [3, 3, 3], "b/c": [1, 1, 1]}


def test_a_response_that_one_reward_cannot_score_is_dropped_under_its_reason() -> None:
    reward = CombinedReward(
        {
            "a": Fixed(Scores([1, math.nan, math.nan], {2: "too_long_to_score"})),
            "b": Fixed(Scores([1, 1, 1], {0: "server_error", 2: "malformed_answer"})),
        },
        {"a": 1.0, "b": 1.0},
    )
    found = checked_scores(reward, PROMPTS, TEXTS)
    assert found.reasons == {0: "server_error", 1: "non_finite_reward", 2: "too_long_to_score"}
    assert all(math.isnan(value) for value in found.rewards)
    assert found.parts["b"] == [1, 1, 1]


def test_a_reward_of_weight_0_is_logged_and_drops_nothing() -> None:
    reward = CombinedReward({"a": Fixed(1, 2, 3), "b": Fixed(7, math.inf, math.nan)}, {"a": 1.0, "b": 0.0})
    rewards, reasons, parts, _ = reward.score(PROMPTS, TEXTS)
    assert rewards == [1, 2, 3]
    assert reasons == {}
    assert parts["b"][:2] == [7, math.inf]


def test_a_reward_that_raises_is_named_and_drops_one_response() -> None:
    def picky(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [1 / len(response) for response in responses]

    parts: dict[str, Reward] = {"a": FunctionReward(length), "b": FunctionReward(picky)}
    reward = CombinedReward(parts, {"a": 1.0, "b": 4.0})
    found = reward.score(PROMPTS, TEXTS)
    assert found.rewards[:2] == [4, 5]
    assert found.reasons == {2: "failed_score"}
    assert "data.reward FunctionReward raised ZeroDivisionError: " in str(found.error)


def test_a_reward_that_breaks_its_contract_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.reward Fixed returned 2 rewards for 3 responses"):
        CombinedReward({"a": Fixed(1, 2)}, {"a": 1.0}).score(PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"rewards without a weight: b; weights without a reward: none$"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"rewards without a weight: none; weights without a reward: c$"),
        ({}, r"rewards without a weight: a, b; weights without a reward: none$"),
    ],
)
def test_weights_under_other_names(weights: dict[str, float], message: str) -> None:
    start = r"^CombinedReward\.weights must have the names of rewards; "
    with pytest.raises(ValueError, match=start + message):
        CombinedReward({"a": Fixed(1), "b": Fixed(1)}, weights)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (math.nan, r"^CombinedReward\.weights\.a=nan must be a finite number$"),
        (math.inf, r"^CombinedReward\.weights\.a=inf must be a finite number$"),
        (
            0.0,
            r"^CombinedReward\.weights=\{'a': 0\.0\} leave every reward 0: give one a weight other than 0$",
        ),
    ],
)
def test_weights_out_of_range(weight: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinedReward({"a": Fixed(1)}, {"a": weight})


def test_no_rewards_at_all() -> None:
    with pytest.raises(ValueError, match=r"^CombinedReward\.weights=\{\} leave every reward 0"):
        CombinedReward({}, {})


def test_every_reward_is_checked_loaded_and_unloaded() -> None:
    log: list[str] = []
    parts: dict[str, Reward] = {name: Fixed(1, name=name, log=log) for name in "ab"}
    reward = LengthPenalty(CombinedReward(parts, {"a": 1.0, "b": 1.0}), per_character=0.1)
    reward.check()
    reward.check_prompts(PROMPTS)
    reward.load(torch.device("cpu"))
    reward.unload()
    steps = ("check {}", "check prompts {}", "load {} on cpu", "unload {}")
    assert log == [step.format(name) for step in steps for name in "ab"]


# ----------------------------------------------------------------- comparative


def beats(prompt: str, first: str, second: str) -> float:
    return float(len(first) > len(second))


def test_comparative_if_one_reward_is() -> None:
    pairwise = PairwiseReward(FunctionJudge(beats))
    plain = FunctionReward(length)
    assert not CombinedReward({"a": plain}, {"a": 1.0}).comparative
    assert CombinedReward({"a": plain, "b": pairwise}, {"a": 1.0, "b": 1.0}).comparative
    assert not LengthPenalty(plain, per_character=1.0).comparative
    assert LengthPenalty(pairwise, per_character=1.0).comparative


# -------------------------------------------------------------- length penalty


def test_a_length_penalty() -> None:
    """0.5 for each character after the first three: 'abcd' pays 0.5, a longer text 0.5 * 5."""
    inner = Scores([1, 2, math.nan], {2: "too_long_to_score"}, {"raw": [7, 8, 9]})
    reward = LengthPenalty(Fixed(inner), per_character=0.5, free=3)
    rewards, reasons, parts, _ = reward.score(PROMPTS, ["abcd", "éé", "x" * 8])
    assert rewards[:2] == [0.5, 2]
    assert math.isnan(rewards[2])
    assert reasons == {2: "too_long_to_score"}
    assert parts["reward"][:2] == [1, 2]
    assert parts["length_penalty"] == [0.5, 0, 2.5]
    assert parts["reward/raw"] == [7, 8, 9]


def test_a_penalised_reward_that_raises_is_named() -> None:
    def broken(*_: Any) -> list[float]:
        raise KeyError("level")

    found = LengthPenalty(FunctionReward(broken), per_character=0.5).score(PROMPTS[:1], ["a"])
    assert found.reasons == {0: "failed_score"}
    assert "raised KeyError: 'level'" in str(found.error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_character": 0.0}, r"^LengthPenalty\.per_character=0\.0 must be a number greater than 0$"),
        ({"per_character": -1.0}, r"^LengthPenalty\.per_character=-1\.0 must be a number greater than 0$"),
        ({"per_character": math.nan}, r"^LengthPenalty\.per_character=nan must be a number greater than 0$"),
        ({"per_character": 1.0, "free": -1}, r"^LengthPenalty\.free=-1 must be 0 characters or more$"),
    ],
)
def test_penalties_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthPenalty(Fixed(1), **settings)


# ---------------------------------------------------------------------- config

CONFIG = f"""
reward:
  class_path: sppo_lightning.rewards.length.LengthPenalty
  init_args:
    per_character: 0.5
    free: 2
    reward:
      class_path: sppo_lightning.rewards.combined.CombinedReward
      init_args:
        rewards:
          long:
            class_path: sppo_lightning.rewards.FunctionReward
            init_args: {{function: {__name__}.length}}
          ranked:
            class_path: sppo_lightning.rewards.pairwise.PairwiseReward
            init_args:
              judge:
                class_path: sppo_lightning.rewards.pairwise.FunctionJudge
                init_args: {{function: {__name__}.beats}}
        weights: {{long: 1, ranked: 10}}
"""


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_argument("--reward", type=Reward)
    return made


def test_from_a_config(tmp_path: Any) -> None:
    """'ab' has 2 + 10 * 0, 'abcd' 4 + 10 * 1 - 0.5 * 2; the config that is written back gives the same."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    parsed = parser().parse_args([f"--config={path}"])
    assert parser().instantiate(parsed).reward.score(PROMPTS[:2], TEXTS[:2]).rewards == [2, 13]
    path.write_text(parser().dump(parsed))
    again = parser().parse_args([f"--config={path}", "--reward.reward.weights.ranked=0"])
    assert parser().instantiate(again).reward.score(PROMPTS[:2], TEXTS[:2]).rewards == [2, 3]


def test_a_config_with_another_name_is_refused(tmp_path: Any) -> None:
    config = yaml.safe_load(CONFIG)
    config["reward"]["init_args"]["reward"]["init_args"]["weights"] = {"long": 1, "rank": 1}
    parsed = parser().parse_object(config)
    with pytest.raises(
        ValueError, match=r"rewards without a weight: ranked; weights without a reward: rank$"
    ):
        parser().instantiate(parsed)
