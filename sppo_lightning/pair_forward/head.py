"""Log-probs of response tokens, and entropies, from hidden states, through the model's own head.

Shapes: N response tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sppo_lightning.pair_forward.logprobs import collision_entropy, token_logps
from sppo_lightning.policy.anatomy import decoders, unwrapped

CHUNK_LOGITS = {"cuda": 1 << 29, "cpu": 1 << 26}  # logits held at once, unless chunk says otherwise


class TokenReadings(NamedTuple):
    """What is read at response tokens; float32, float64 for a float64 model."""

    logps: Tensor  # [N], nats
    collision_entropy: Tensor | None = None  # [N], nats, no gradient; None: not asked for


def read_tokens(
    model: nn.Module, hidden: Tensor, targets: Tensor, *, chunk: int | None = None, with_entropy: bool = False
) -> TokenReadings:
    """Return the log-prob of each target.

    The vocabulary is met a chunk of positions at a time. The logits of all chunks but the last are computed again in
    the backward pass, so that no more of them ever exist than a chunk's.

    Args:
        model: a transformers causal language model, PEFT's wrapper around it or not.
        hidden: ``[N, H]``, states after the model's last norm that predict the targets.
        targets: ``[N]`` token ids.
        chunk: positions at once; ``None``: as many as 2^26 logits are (2^29 on CUDA).
        with_entropy: return the collision entropy where each target is predicted too.
    """
    if chunk is None:
        logits_at_once = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cpu"])
        chunk = max(1, logits_at_once // unwrapped(model).config.get_text_config().vocab_size)

    def read(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(model, states)
        logps = token_logps(logits, ids)
        return (logps, collision_entropy(logits)) if with_entropy else (logps,)

    parts = list(zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True))
    found = [checkpoint(read, *part, use_reentrant=False) for part in parts[:-1]] + [read(*parts[-1])]
    return TokenReadings(*(torch.cat(each) for each in zip(*found, strict=True)))


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return ``[N, V]``: head, scaling and soft cap are applied by the model's own forward, to given states."""
    with _decoder_returns(model, hidden[None]):
        # past its hooks: sharded weights are gathered by the forward that this is a part of
        logits: Tensor = unwrapped(model).forward(inputs_embeds=hidden[None], use_cache=False).logits
    return logits[0]


@contextmanager
def _decoder_returns(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let the model's decoder return ``hidden`` without computing anything."""
    output = _returned()(last_hidden_state=hidden)

    def given(*args: Any, **kwargs: Any) -> Any:
        return output

    inside = decoders(model)  # a head may ask the inner one of two
    before = [vars(decoder).get("forward") for decoder in inside]
    for decoder in inside:
        decoder.forward = given  # on the object, in front of the class's own
    try:
        yield
    finally:
        for decoder, own in zip(inside, before, strict=True):
            del decoder.forward
            if own is not None:
                decoder.forward = own


@cache
def _returned() -> Any:
    """Return a class of decoder outputs in which all but the hidden states is ``None``, whatever is asked for."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Returned(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Returned
