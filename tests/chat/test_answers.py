"""Answers, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sppo_lightning.chat.answers import Answer, Sampling, answer_logps, sampled_tokens
from sppo_lightning.chat.policies import ChatPolicy
from sppo_lightning.generation import HFGenerator, SampleRequest
from sppo_lightning.types import UserError

PROMPT = [0, *range(60, 70)]


def from_generator(policy: ChatPolicy, seeds: tuple[int, ...], **sampling: Any) -> list[list[int]]:
    """What the engine that runs sample with makes of it."""
    generator = HFGenerator(**sampling)
    source: Any = SimpleNamespace(
        tokenizer=policy.tokenizer,
        end_token_ids=policy.end_token_ids,
        sampling_model=lambda: policy.held.model,
    )
    generator.load(source)
    (found,) = generator.generate([SampleRequest(tuple(PROMPT), seeds)])
    return [list(response.token_ids) for response in found.responses]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5}])
def test_it_samples_what_training_samples(policy: ChatPolicy, options: dict[str, Any]) -> None:
    seeds = (1, 2, 3)
    expected = from_generator(policy, seeds, max_new_tokens=20, temperature=0.9, **options)
    sampling = Sampling(0.9, options.get("top_p", 1.0), options.get("top_k", 0), 20)
    assert [list(sampled_tokens(policy, PROMPT, sampling, seed=seed)) for seed in seeds] == expected
    assert len({tuple(each) for each in expected}) == 3


def test_temperature_0_is_greedy(policy: ChatPolicy) -> None:
    (expected,) = from_generator(policy, (), max_new_tokens=20, temperature=1.0)
    assert list(sampled_tokens(policy, PROMPT, Sampling(0.0, 1.0, 0, 20), seed=5)) == expected


def test_an_answer_ends_with_the_window_or_is_refused(policy: ChatPolicy) -> None:
    assert policy.window == 512
    long = [60] * 508
    assert len(list(sampled_tokens(policy, long, Sampling(0.0, 1.0, 0, 20), seed=5))) <= 4
    with pytest.raises(
        UserError, match=r"^the conversation has 512 tokens, and \S+ has positions for 512 only"
    ):
        next(sampled_tokens(policy, [60] * 512, Sampling(0.0, 1.0, 0, 20), seed=5))


def test_two_answers_can_grow_in_turn(policy: ChatPolicy) -> None:
    sampling = Sampling(1.0, 1.0, 0, 12)
    alone = [list(sampled_tokens(policy, PROMPT, sampling, seed=seed)) for seed in (1, 2)]
    growing = [sampled_tokens(policy, PROMPT, sampling, seed=seed) for seed in (1, 2)]
    together = list(zip(*growing, strict=False))
    for column, whole in zip(zip(*together, strict=True), alone, strict=True):
        assert list(column) == whole[: len(column)]


def test_text_grows_by_whole_characters(policy: ChatPolicy) -> None:
    text = "é🙂 \x1b[31mred"
    ids = policy.tokenizer(text)["input_ids"]
    answer = Answer(policy)
    pieces = [answer.add(token) for token in ids]
    assert pieces[:3] == ["", "é", ""]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + answer.end() == answer.text == text
    assert not answer.finished
    assert answer.add(1) == ""
    assert answer.finished


def test_bytes_that_never_become_a_character_come_at_the_end(policy: ChatPolicy) -> None:
    first, *_ = policy.tokenizer("é")["input_ids"]
    answer = Answer(policy)
    assert answer.add(first) == ""
    assert answer.end() == "\ufffd"


def test_log_probs_of_an_answer(policy: ChatPolicy) -> None:
    answer = [70, 71, 1]
    with torch.no_grad():
        logits = policy.held.model(torch.tensor([PROMPT + answer])).logits[0]
    expected = logits.log_softmax(-1)[range(len(PROMPT) - 1, len(PROMPT) + 2), answer]
    torch.testing.assert_close(answer_logps(policy, PROMPT, answer), expected, atol=1e-5, rtol=0)
