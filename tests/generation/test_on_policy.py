"""A server that samples from other weights than the policy's is found by its greedy answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from support.models import byte_tokenizer
from support.tiny import tiny_model
from torch import nn

from sppo_lightning.generation.on_policy import OnPolicyCheck
from sppo_lightning.generation.parity import (
    PROBE_TOKENS,
    ParityError,
    ProbeAnswer,
    answer_logits,
    token_logps,
)
from sppo_lightning.types import UserError

PROMPTS = OnPolicyCheck().prompts(byte_tokenizer(), tiny_model(), longest=None)


def greedy(model: nn.Module, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[ProbeAnswer]:
    """What a server with these weights answers."""
    found = []
    for prompt in prompts:
        tokens: list[int] = []
        for _ in range(PROBE_TOKENS):
            logits = answer_logits(model, prompt, [*tokens, 0])
            tokens.append(int(logits[-1].argmax()))
        found.append(
            ProbeAnswer(
                tokens, token_logps(answer_logits(model, prompt, tokens), torch.tensor(tokens)).tolist()
            )
        )
    return found


def moved(model: nn.Module, by: float) -> nn.Module:
    """The model after some training."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def checked(
    check: OnPolicyCheck, policy: nn.Module, answers: Sequence[ProbeAnswer], server: str = "s"
) -> None:
    check.check(policy, PROMPTS, answers, server=f"base_url={server!r}", weights="policy-1")


def test_the_policys_own_answers_pass_at_every_phase() -> None:
    check = OnPolicyCheck()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for by in (0.0, 1e-4, 0.3, 0.3):
            policy = moved(tiny_model(), by)
            checked(check, policy, greedy(policy))


def test_other_weights_are_an_error_that_names_server_and_weights() -> None:
    message = (
        r"^base_url='s' does not sample from the current policy \('policy-1'\), but from older or other weights: "
        r"a greedy token lies .*: see that it serves the policy's own base model"
    )
    with pytest.raises(ParityError, match=message):
        checked(OnPolicyCheck(), tiny_model(), greedy(moved(tiny_model(), 0.1)))


def test_weights_that_were_not_updated_are_found_below_bfloat16s_rounding() -> None:
    check, before = OnPolicyCheck(), tiny_model()
    now = moved(before, 2e-4)
    checked(check, before, greedy(before))
    with pytest.raises(
        UserError, match=r"log-probs have stayed as they were \(by 0 nat per token\) since the last phase"
    ):
        checked(check, now, greedy(before))


def test_what_one_server_said_is_not_held_against_another() -> None:
    check, before = OnPolicyCheck(), tiny_model()
    checked(check, before, greedy(before), "one")
    with pytest.warns(UserWarning, match="in bfloat16 only"):
        checked(check, moved(before, 2e-4), greedy(before), "other")


def test_a_policy_that_has_not_changed_may_be_answered_alike() -> None:
    check, policy = OnPolicyCheck(), tiny_model()
    for _ in range(2):
        checked(check, policy, greedy(policy))


def test_a_server_in_bfloat16_is_warned_of_once() -> None:
    policy = tiny_model()
    rounded = greedy(copy.deepcopy(policy).bfloat16())
    check = OnPolicyCheck()
    with pytest.warns(
        UserWarning, match=r"base_url='s' answers as the policy does in bfloat16 only \(.*float32\)"
    ):
        checked(check, policy, rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(check, policy, rounded)


def test_a_tolerance_of_ones_own_decides_alone() -> None:
    policy, other = tiny_model(), moved(tiny_model(), 0.1)
    checked(OnPolicyCheck(tolerance=50.0), policy, greedy(other))
    with pytest.raises(
        ParityError, match=r"log-probs lie .* nat per token off the policy's \(logp_tolerance 0.001\)"
    ):
        checked(OnPolicyCheck(tolerance=0.001), policy, greedy(other))


def test_tokens_alone_are_compared_where_a_server_gives_no_log_probs() -> None:
    policy = tiny_model()
    silent = [answer._replace(logps=None) for answer in greedy(policy)]
    checked(OnPolicyCheck(), policy, silent)
    with pytest.raises(ParityError, match="a greedy token lies"):
        checked(OnPolicyCheck(), moved(policy, 0.3), silent)


def test_a_server_whose_answers_are_not_known_is_not_judged() -> None:
    checked(OnPolicyCheck(), tiny_model(), [ProbeAnswer((), None)] * len(PROMPTS))


def test_prompts_leave_room_for_an_answer() -> None:
    for longest in (20, 40, 10_000):
        prompts = OnPolicyCheck().prompts(byte_tokenizer(), tiny_model(), longest=longest)
        assert max(map(len, prompts)) <= min(longest, 512) - PROBE_TOKENS
        assert len(set(prompts)) == len(prompts)
