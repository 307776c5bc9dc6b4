"""Win probabilities made of a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppo_lightning.rewards import FunctionJudge, PairwiseReward, Reward, Scores, WinProbabilityReward
from sppo_lightning.rewards.protocol import RewardMemory, checked_scores
from sppo_lightning.types import Message, Prompt

PROMPTS = [Prompt(name, name, (Message(role="user", content=name),)) for name in "pppqq"]
TEXTS = list("abcde")
L3 = math.log(3)


class Fixed(Reward):
    """Gives what it was told to."""

    def __init__(self, *found: Any) -> None:
        self.found = found
        self.log: list[str] = []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float] | Scores:
        return self.found[0] if isinstance(self.found[0], Scores) else list(self.found)

    def check(self) -> None:
        self.log.append("check")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.log.append("check prompts")

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        return RewardMemory(weights=tokens)

    def smaller(self) -> dict[str, Reward]:
        return {"init_args.size=1": Fixed(1)}

    def load(self, device: torch.device) -> None:
        self.log.append(f"load {device}")

    def unload(self) -> None:
        self.log.append("unload")


def test_the_mean_of_a_bradley_terry_model() -> None:
    """Gaps of 2 ln 3 and 0 at scale 2: 3/4 and 1/2; and of the two prompts each by itself."""
    found = WinProbabilityReward(Fixed(2 * L3, 0, 0, 5, 5), scale=2).score(PROMPTS, TEXTS)
    assert found.rewards == [2 * L3, 0, 0, 5, 5]
    assert found.parts["win_probability"] == pytest.approx([3 / 4, (1 / 4 + 1 / 2) / 2, 3 / 8, 1 / 2, 1 / 2])


def test_a_response_without_a_reward_is_no_opponent() -> None:
    inner = Scores([L3, math.nan, 0, math.nan, 1], {1: "too_long_to_score"}, {"raw": [1, 2, 3, 4, 5]})
    found = checked_scores(WinProbabilityReward(Fixed(inner), scale=1), PROMPTS, TEXTS)
    probabilities = found.parts["win_probability"]
    assert probabilities[0] == pytest.approx(3 / 4)
    assert probabilities[2] == pytest.approx(1 / 4)
    assert all(math.isnan(probabilities[row]) for row in (1, 3, 4))  # the last one has nobody to beat
    assert found.reasons == {1: "too_long_to_score", 3: "non_finite_reward"}
    assert found.parts["reward/raw"] == [1, 2, 3, 4, 5]


@given(st.lists(st.floats(-1e300, 1e300), min_size=5, max_size=5), st.floats(1e-3, 1e3))
def test_probabilities_of_a_prompt_add_up_to_half_its_responses(rewards: list[float], scale: float) -> None:
    found = WinProbabilityReward(Fixed(*rewards), scale).score(PROMPTS, TEXTS).parts["win_probability"]
    assert all(0 <= probability <= 1 for probability in found)
    assert sum(found[:3]) == pytest.approx(1.5)
    assert sum(found[3:]) == pytest.approx(1)
    assert found[rewards.index(max(rewards[:3]), 0, 3)] == pytest.approx(max(found[:3]))


def test_all_responses_have_to_be_there_but_difficulty_stays() -> None:
    reward = WinProbabilityReward(Fixed(1), scale=1)
    assert reward.comparative
    assert reward.gives_difficulty
    assert reward.gives_win_probabilities
    pairwise = PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5))
    assert not WinProbabilityReward(pairwise, scale=1).gives_difficulty


def test_the_other_reward_is_checked_loaded_and_unloaded() -> None:
    inner = Fixed(1)
    reward = WinProbabilityReward(inner, scale=3)
    reward.check()
    reward.check_prompts(PROMPTS)
    reward.load(torch.device("cpu"))
    reward.unload()
    assert inner.log == ["check", "check prompts", "load cpu", "unload"]
    assert reward.memory(torch.device("cpu"), 7).weights == 7
    ((setting, smaller),) = reward.smaller().items()
    assert setting == "init_args.reward.init_args.size=1"
    assert isinstance(smaller, WinProbabilityReward)
    assert smaller.scale == 3


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_scale(scale: float) -> None:
    message = rf"^WinProbabilityReward\.scale={scale} must be a number greater than 0$"
    with pytest.raises(ValueError, match=message):
        WinProbabilityReward(Fixed(1), scale)
