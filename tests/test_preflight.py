"""Checks before a run, each alone; in a whole run in integration/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.rules import iteration_rules
from transformers import Phi3Config, Phi3ForCausalLM

from sppo_lightning.generation import HFGenerator
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.losses import CombinedLoss, DPOLoss, PreferenceLoss, SPPOSoftLoss
from sppo_lightning.preflight import (
    check_comparative,
    check_context,
    check_engine_limit,
    check_loss,
    check_win_probabilities,
    longest_prompt,
    rope_switch,
)
from sppo_lightning.rewards import FunctionJudge, FunctionReward, PairwiseReward, WinProbabilityReward
from sppo_lightning.selection import (
    AdaptiveTarget,
    All,
    AllPairs,
    DifficultyPools,
    Schedule,
    SkipTied,
)
from sppo_lightning.types import UserError


class ByWinProbability(AllPairs):
    requires = ("gap", "chosen_win_probability")


def rules(**changes: Any) -> IterationRules:
    return iteration_rules(**{"iterations": 1, "pairs_per_step": 8, **changes})


def score(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    return [0.0 for _ in responses]


def test_a_rule_that_reads_win_probabilities_needs_a_reward_that_gives_them() -> None:
    wanting = rules(pair_selection=ByWinProbability())
    message = (
        r"^data\.pair_selection: ByWinProbability needs the column 'chosen_win_probability', but data\.reward "
        r"FunctionReward gives no win probabilities: use PairwiseReward, or another rule$"
    )
    with pytest.raises(UserError, match=message):
        check_win_probabilities(FunctionReward(score), wanting)
    check_win_probabilities(FunctionReward(score), rules())
    check_win_probabilities(PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5)), wanting)


@pytest.mark.parametrize(
    "loss",
    [SPPOSoftLoss(0.1), CombinedLoss({"a": DPOLoss(0.1), "b": SPPOSoftLoss(0.1)}, {"a": 1.0, "b": 1.0})],
)
def test_a_loss_that_reads_win_probabilities_needs_a_reward_that_gives_them(loss: PreferenceLoss) -> None:
    plain = FunctionReward(score)
    message = (
        rf"^model\.loss {type(loss).__name__} needs win probabilities, but data\.reward FunctionReward gives none: use "
        r"PairwiseReward, put the reward into WinProbabilityReward, or use another loss$"
    )
    with pytest.raises(UserError, match=message):
        check_loss(loss, rules(), plain)
    check_loss(loss, rules(), WinProbabilityReward(plain, scale=1.0))
    check_loss(loss, rules(), PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5)))
    check_loss(DPOLoss(0.1), rules(), plain)


def test_win_probabilities_of_a_reward_leave_its_difficulty_to_select_by() -> None:
    """Unlike a judge's, which have the same mean for every prompt; but all responses have to be there at once."""
    reward = WinProbabilityReward(FunctionReward(score), scale=1.0)
    assert "difficulty" in rules().selection.requires
    check_comparative(reward, rules(probe_samples=4))
    with pytest.raises(UserError, match=r"there at once: set data\.probe_samples=4$"):
        check_comparative(reward, rules(probe_samples=2))
    judged = PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5))
    with pytest.raises(UserError, match=r"every prompt has the same mean reward and data\.selection Easiest"):
        check_comparative(judged, rules(probe_samples=4))


# ------------------------------------------------------------ an engine's limit


class Limited(HFGenerator):
    """An engine that takes less than the policy does, as a server may."""

    def total_limit(self) -> int:
        return 40


def test_an_engine_that_would_cut_responses_short_is_refused() -> None:
    check_engine_limit(32, Limited(max_new_tokens=8, temperature=1.0))
    message = (
        r"^data\.generator Limited takes 40 tokens of prompt and response together, but the longest prompt has 33, "
        r"with 8 new ones 41: let it take more \(a vLLM server: --max-model-len 41\), or set max_total_tokens: 40,"
    )
    with pytest.raises(UserError, match=message):
        check_engine_limit(33, Limited(max_new_tokens=8, temperature=1.0))
    check_engine_limit(33, Limited(max_new_tokens=8, temperature=1.0, max_total_tokens=40))
    check_engine_limit(33, HFGenerator(max_new_tokens=8, temperature=1.0))
    assert longest_prompt(Limited(max_new_tokens=8, temperature=1.0), tiny_config()) == 32


# --------------------------------------------------------------------- LongRoPE


def phi(original: int) -> Phi3Config:
    return Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=original,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        pad_token_id=0,
    )


def test_a_batch_is_not_let_over_the_switch_of_longrope() -> None:
    generator = HFGenerator(max_new_tokens=8, temperature=1.0)
    assert rope_switch(phi(64)) == 64
    check_context(56, generator, phi(64), key="prompts")
    with pytest.raises(
        UserError, match=r"^data\.prompts: the longest prompt has 57 tokens, with 8 new ones more than the 64"
    ):
        check_context(57, generator, phi(64), key="prompts")
    assert rope_switch(tiny_config()) is None


def test_the_longest_prompt_leaves_room_for_a_response() -> None:
    """Context 512 less 12; of LongRoPE's switch at 24 less 12; under a total of 20 tokens one may be the response's."""
    generator = HFGenerator(max_new_tokens=12, temperature=1.0)
    assert longest_prompt(generator, tiny_config()) == 500
    assert longest_prompt(generator, phi(24)) == 12
    assert longest_prompt(generator, object()) == sys.maxsize
    short = HFGenerator(max_new_tokens=12, temperature=1.0, max_total_tokens=20)
    assert longest_prompt(short, tiny_config()) == 19


def test_one_long_neighbour_does_change_the_log_probs_of_such_a_model() -> None:
    """Why it is refused."""
    torch.manual_seed(0)
    config = phi(8)
    config.update(
        {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64, "num_key_value_heads": 4}
    )
    model = Phi3ForCausalLM(config).eval()
    short, long = torch.arange(8)[None], torch.arange(12)[None]
    with torch.no_grad():
        alone = model(short).logits
        padded = torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], 1)
        mask = torch.tensor([[1] * 8 + [0] * 4, [1] * 12])
        together = model(torch.cat([padded, long]), attention_mask=mask).logits[:1, :8]
    assert not torch.allclose(alone, together, atol=1e-3)


# ------------------------------------------------------------ what rules read of the prompts


@pytest.mark.parametrize(
    "schedule", [DifficultyPools(), AdaptiveTarget(0.5, start=0, step=1, target_reward=0)]
)
def test_a_comparative_reward_gives_a_schedule_no_difficulty(schedule: Schedule) -> None:
    reward = PairwiseReward(FunctionJudge(lambda prompt, first, second: 0.5))
    wanting = rules(schedule=schedule, selection=All(), probe_samples=4)
    with pytest.raises(
        UserError, match=rf"data\.schedule {type(schedule).__name__} has nothing to choose by"
    ):
        check_comparative(reward, wanting)
    check_comparative(reward, rules(schedule=SkipTied(), selection=All(), probe_samples=4))
