"""Log-probs of a run's own responses, read by a policy before and after its export.

Weights are held in their own dtype and multiplied in float32, a decoder layer at a time, so that what differs are the
weights, not the roundings of a 16-bit product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.pair_forward.logprobs import token_logps
from sppo_lightning.policy.anatomy import decoder_layers, unwrapped
from sppo_lightning.policy.merging import adapted_layers, merged_weight
from sppo_lightning.types import PreferencePair

PAIRS = 4  # read at most
TOKENS = 1024  # of all sequences together, but for the first pair


class Logps(NamedTuple):
    """What a model makes of the same response tokens, ``[N]`` nats each."""

    policy: Tensor
    base: Tensor  # its adapter switched off; the policy's own where it has none


def sample_pairs(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """Return a few pairs, the shortest first: at most :data:`PAIRS`, of :data:`TOKENS` in all."""

    def tokens(pair: PreferencePair) -> int:
        return 2 * len(pair.prompt_token_ids) + len(pair.chosen_token_ids) + len(pair.rejected_token_ids)

    chosen: list[PreferencePair] = []
    total = 0
    for pair in sorted(pairs, key=tokens):
        total += tokens(pair)
        if len(chosen) == PAIRS or (chosen and total > TOKENS):
            break
        chosen.append(pair)
    return chosen


def read(model: nn.Module, pairs: Sequence[PreferencePair]) -> Logps:
    """Read the pairs by a model, and by its base if it has an adapter."""
    policy = response_logps(model, pairs)
    if not hasattr(model, "peft_config"):
        return Logps(policy, policy)
    with cast(Any, model).disable_adapter():
        return Logps(policy, response_logps(model, pairs))


def response_logps(model: nn.Module, pairs: Iterable[PreferencePair]) -> Tensor:
    """Return what :func:`own_dtype_logps` does, multiplied in float32 whatever the weights' dtype is."""
    with float32_products(model):
        return own_dtype_logps(model, pairs)


@torch.no_grad()
def own_dtype_logps(model: nn.Module, pairs: Iterable[PreferencePair]) -> Tensor:
    """Return the log-prob of each response token, ``[N]`` float64, nats, each sequence read by itself.

    Args:
        model: a causal language model, with or without an adapter.
        pairs: their chosen and rejected responses, token ids as they were sampled.
    """
    found = []
    device = unwrapped(model).get_input_embeddings().weight.device
    for pair in pairs:
        start = len(pair.prompt_token_ids)
        for response in (pair.chosen_token_ids, pair.rejected_token_ids):
            ids = torch.tensor([pair.prompt_token_ids + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            found.append(token_logps(logits, ids[0, start:]).cpu().double())
    return torch.cat(found)


def digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return a digest of each weight, by name; two are the same if every bit is."""

    def digest(weight: Tensor) -> str:
        content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(content.data).hexdigest()

    return {name: digest(weight) for name, weight in weights}


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while the context lasts; decoder layers are cast one at a time.

    Quantised weights stay as they are. 4-bit layers cast inputs to a dtype of their own, and
    dequantise to it: float32 meanwhile.
    """
    layers = list(decoder_layers(model))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack:
        for part in model.modules():
            if hasattr(part, "compute_type_is_set"):
                stack.enter_context(_swapped(part, "compute_dtype", torch.float32))
        stack.enter_context(
            _in_float32(parameter for parameter in model.parameters() if id(parameter) not in inside)
        )
        for layer in layers:
            stack.enter_context(_around(layer, lambda part: _in_float32(part.parameters())))
        yield


@contextmanager
def merged_on_the_fly(model: nn.Module) -> Iterator[None]:
    """Let each adapted layer answer by its merged weights, made in float32 when it is reached, in this context."""
    with ExitStack() as stack:
        for layer in adapted_layers(model).values():
            stack.enter_context(_around(layer, _merged))
        yield


@contextmanager
def _around(module: Any, context: Callable[[Any], AbstractContextManager[None]]) -> Iterator[None]:
    """Compute a module's forward inside ``context(module)``, while this one lasts."""
    forward, own = module.forward, vars(module).get("forward")

    @wraps(forward)
    def within(*args: Any, **options: Any) -> Any:
        with context(module):
            return forward(*args, **options)

    module.forward = within
    try:
        yield
    finally:
        del module.forward  # a bound method that stayed would keep the model in memory
        if own is not None:
            module.forward = own


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    stored = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stored)


@contextmanager
def _in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.is_floating_point():
                stack.enter_context(_swapped(parameter, "data", parameter.data.float()))
        yield


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    with _swapped(layer.get_base_layer().weight, "data", merged_weight(layer)):
        layer.enable_adapters(False)
        try:
            yield
        finally:
            layer.enable_adapters(True)
