"""Prompts that leave no room for a response: in an engine, in the policy's context, under LongRoPE's switch."""

from __future__ import annotations

import sys

import pytest
import torch
from support.models import tiny_config
from transformers import Phi3Config, Phi3ForCausalLM

from sppo_lightning.generation import HFGenerator
from sppo_lightning.generation.context import check_context, check_engine_limit, longest_prompt, rope_switch
from sppo_lightning.types import UserError

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
