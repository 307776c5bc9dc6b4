"""The models and pairs that the golden values belong to; needs torch and transformers only.

The recording script and the test both build from here. Weights come from integer arithmetic, not from a
random generator: they are the same under every version of torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48
BOS, EOS = 0, 1
PAD = EOS  # as for a tokenizer without a pad token: a mask that looks for the pad id would lose end tokens


class Pair(NamedTuple):
    """Token ids of one preference pair."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


PAIRS = (
    # a response that was cut, so without an end token
    Pair((BOS, 5, 9, 12), (7, 8, 21, EOS), (30, 14)),
    # the same prompt; a response of one token
    Pair((BOS, 5, 9, 12), (7, 33, 40, 2, EOS), (11,)),
    # a prompt of one token; a response that is nothing but the end token
    Pair((BOS,), (EOS,), (17, 26, 3, EOS)),
    # the longest prompt, an end token inside it
    Pair((BOS, 4, 22, EOS, 6, 44, 13, 29, 38, 10), (19, EOS), (19, 27, 45, EOS)),
    # responses that begin alike
    Pair((BOS, 18, 31), (23, 35, 16, 16, 42, EOS), (23, 35, 16, 20, 8, 41, 25, EOS)),
    # the longest responses, both cut
    Pair((BOS, 47, 36), (15, 24, 32, 39, 46, 28, 34, 43, 37, 5, 9, 12), (6, 13, 6, 13, 6, 13, 6, 13, 6)),
)


def policy() -> LlamaForCausalLM:
    """Return the policy."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=None,  # else the pad token's embedding would get no gradient
            tie_word_embeddings=False,
            dtype="float32",
        )
    )
    _fill(model, seed=1, scale=1.0)
    return model


def reference() -> LlamaForCausalLM:
    """Return the frozen reference: the policy, moved some way."""
    model = policy()
    _fill(model, seed=1000, scale=0.25)
    return model.requires_grad_(False)


def gradient_summary(model: torch.nn.Module) -> dict[str, float]:
    """Return the gradient's ``norm``, its product ``along`` a fixed direction, and each parameter's norm.

    The product is there because a norm does not see a wrong sign.
    """
    gradients = {name: p.grad.double() for name, p in sorted(model.named_parameters()) if p.grad is not None}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    return {"norm": float(whole.norm()), "along": float(whole @ _uniform(len(whole), seed=7)), **norms}


def _fill(model: torch.nn.Module, *, seed: int, scale: float) -> None:
    """Add uniform noise to the weights; with ``scale=1`` replace them: noise around 0, for norms around 1."""
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        matrix = parameter.ndim > 1
        noise = _uniform(parameter.numel(), seed + number).view_as(parameter) * (0.5 if matrix else 0.2)
        start = parameter.detach().double() if scale < 1 else torch.full_like(noise, 0.0 if matrix else 1.0)
        parameter.data.copy_(start + scale * noise)


def _uniform(count: int, seed: int) -> Tensor:
    """Return ``[count]`` float64 in [-1, 1): squares and multiples modulo a prime, exact in int64."""
    prime = 2**31 - 1
    state = (torch.arange(1, count + 1) * 48271 + seed * 69621) % prime
    for _ in range(3):
        state = (state * state + seed) % prime * 48271 % prime
    return state.double() / prime * 2 - 1
