"""Whether an exported policy is the trained one: log-probs of the run's own responses, read by both.

Weights are held in their own dtype and multiplied in float32, a decoder layer at a time, so that what differs are the
weights, not the roundings of a 16-bit product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.pair_forward.logprobs import token_logps
from sppo_lightning.policy.agreement import TOLERANCES, compare_stored_sums, distance
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.merging import adapted_layers, merged_weight
from sppo_lightning.types import PreferencePair, UserError

EXACT = TOLERANCES[torch.float32].least  # models are read in float32
# weights rounded to 16 bits change log-probs 0.4 to 2.1 times as much as products in 16 bits do, on a 135M model; that
# it is the right weights which were rounded is compared bit by bit
ROUNDINGS = 4
STORED = 1e-3  # nats per token that another device and its kernels explain, in float32
PAIRS = 4  # read at most
TOKENS = 1024  # of all sequences together, but for the first pair


@dataclass(frozen=True)
class Distance:
    """How far two models' log-probs of the same tokens lie apart.

    Args:
        between: the two models, in words.
        nats: mean absolute difference per response token.
        allowed: the most that it may be.
        because: what that covers.
        otherwise: what it means if it is more.
    """

    between: str
    nats: float
    allowed: float
    because: str
    otherwise: str = "the export is not the trained policy"

    @property
    def holds(self) -> bool:
        """Whether the distance is allowed; NaN is not."""
        return self.nats <= self.allowed


class AdapterLogps(NamedTuple):
    """What a model with an adapter makes of the same tokens, ``[N]`` each."""

    policy: Tensor
    base: Tensor  # its adapter switched off


class ExportedLogps(NamedTuple):
    """What an exported model makes of the tokens, ``[N]``."""

    policy: Tensor
    rounding: float  # mean change per token by computing in the weights' own dtype; 0 in float32


def compared(
    between: str, one: Tensor, other: Tensor, *, rounding: float = 0.0, base: float = 0.0
) -> Distance:
    """Return how far two models are apart, and how far they may be.

    Args:
        between: the two, in words.
        one: log-probs of the one, ``[N]`` nats.
        other: of the other.
        rounding: of :class:`ExportedLogps`.
        base: distance of the two bases, where they were held in two ways.
    """
    covers = [f"{EXACT:g} for float32 arithmetic"]
    if rounding:
        covers.append(f"{ROUNDINGS} times the {rounding:.2g} that computing in 16 bits changes")
    if base:
        covers.append(f"twice the {base:.2g} between the two bases alone")
    allowed = EXACT + ROUNDINGS * rounding + 2 * base
    return Distance(between, distance(one, other), allowed, " + ".join(covers))


def compared_with_stored(
    base: Tensor, pairs: Sequence[PreferencePair], *, iteration: int, coarsest: torch.dtype
) -> Distance:
    """Return how far a base is from the reference's log-probs that training stored: sums of whole responses.

    Args:
        base: log-probs of each response token of ``pairs``, ``[N]`` nats.
        pairs: with what was stored.
        iteration: that the pairs are of.
        coarsest: dtype of training's products or weights, the one with more rounding.
    """
    sides = ("chosen", "rejected")
    lengths = [len(getattr(pair, f"{side}_token_ids")) for pair in pairs for side in sides]
    stored = [getattr(pair, f"reference_{side}_logp") for pair in pairs for side in sides]
    sums = torch.stack([part.sum() for part in torch.split(base, lengths)])
    reference = torch.tensor(stored, dtype=sums.dtype)
    agreement = compare_stored_sums(sums, reference, tokens=sum(lengths), dtype=coarsest)
    return Distance(
        f"the base and the reference's log-probs that training stored in iteration {iteration}",
        *agreement.allowing(STORED),
        f"sums of whole responses, computed in {str(coarsest).removeprefix('torch.')} in training",
        "the base is not the one that the run was trained on",
    )


def digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return a digest of each weight, by name; two are the same if every bit is."""

    def digest(weight: Tensor) -> str:
        content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(content.data).hexdigest()

    return {name: digest(weight) for name, weight in weights}


def require(distances: Iterable[Distance], *, altered: Sequence[str], folder: Path) -> None:
    """Refuse an export that is not the trained policy.

    Args:
        distances: between the two.
        altered: names of weights that are not what was to be written.
        folder: of the export.

    Raises:
        UserError: naming what differs, and by how much.
    """
    broken: dict[str, list[str]] = {}
    for found in distances:
        if not found.holds:
            broken.setdefault(found.otherwise, []).append(
                f"{found.between} differ by {found.nats:.2g} nat per token, allowed are {found.allowed:.2g} "
                f"({found.because})"
            )
    for name in altered[:1]:
        broken.setdefault(Distance.otherwise, []).append(
            f"{len(altered)} weights are not what was to be written, e.g. {name}"
        )
    if broken:
        reasons = "; ".join(f"{meaning}: {'; '.join(found)}" for meaning, found in broken.items())
        raise UserError(f"{reasons}. It stays in {folder} to be looked at, not used")


def sample_pairs(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return a few pairs, the shortest first: at most :data:`PAIRS`, of :data:`TOKENS` in all."""
    chosen: list[PreferencePair] = []
    total = 0
    for pair in sorted(pairs, key=_tokens):
        total += _tokens(pair)
        if len(chosen) == PAIRS or (chosen and total > TOKENS):
            break
        chosen.append(pair)
    return chosen


def _tokens(pair: PreferencePair) -> int:
    return 2 * len(pair.prompt_token_ids) + len(pair.chosen_token_ids) + len(pair.rejected_token_ids)


def response_logps(model: nn.Module, pairs: Iterable[PreferencePair], *, exact: bool = True) -> Tensor:
    """Return the log-prob of each response token, ``[N]`` float64, nats, each sequence read by itself.

    Args:
        model: a causal language model, with or without an adapter.
        pairs: their chosen and rejected responses, token ids as they were sampled.
        exact: multiply in float32 whatever the weights' dtype is.
    """
    with torch.no_grad(), float32_products(model) if exact else nullcontext():
        return torch.cat(
            [
                _logps(model, pair.prompt_token_ids, response)
                for pair in pairs
                for response in (pair.chosen_token_ids, pair.rejected_token_ids)
            ]
        )


def _logps(model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    device = cast(Any, unwrapped(model)).get_input_embeddings().weight.device
    ids = torch.tensor([prompt + response], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return token_logps(logits, ids[0, len(prompt) :]).cpu().double()


def adapter_logps(model: nn.Module, pairs: Sequence[PreferencePair]) -> AdapterLogps:
    """Read the pairs with an adapter switched on, and off."""
    policy = response_logps(model, pairs)
    with cast(Any, model).disable_adapter():
        return AdapterLogps(policy, response_logps(model, pairs))


def exported_logps(model: nn.Module, pairs: Sequence[PreferencePair]) -> ExportedLogps:
    """Read the pairs with a whole model, in float32 products and, where that is another one, in its own dtype."""
    policy = response_logps(model, pairs)
    if cast(Any, model).dtype in (torch.float32, torch.float64):
        return ExportedLogps(policy, 0.0)
    return ExportedLogps(policy, distance(policy, response_logps(model, pairs, exact=False)))


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while the context lasts; decoder layers are cast one at a time.

    Quantised weights stay as they are. 4-bit layers cast inputs to a dtype of their own, and
    dequantise to it: float32 meanwhile.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in unwrapped(model).modules() if isinstance(part, GradientCheckpointingLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack:
        stack.enter_context(_computing_in_float32(model))
        stack.enter_context(
            _cast(parameter for parameter in model.parameters() if id(parameter) not in inside)
        )
        for layer in layers:
            stack.enter_context(_around(layer, lambda part: _cast(part.parameters())))
        yield


@contextmanager
def merged_in_passing(model: nn.Module) -> Iterator[None]:
    """Let each adapted layer answer by its merged weights, made in float32 when it is reached, in this context."""
    with ExitStack() as stack:
        for layer in adapted_layers(model).values():
            stack.enter_context(_around(layer, _merged))
        yield


@contextmanager
def _around(module: nn.Module, context: Any) -> Iterator[None]:
    """Enter ``context(module)`` before each of a module's forwards, and leave it after."""
    entered: list[ExitStack] = []

    def enter(part: nn.Module, args: Any) -> None:
        stack = ExitStack()
        stack.enter_context(context(part))
        entered.append(stack)

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        entered.pop().close()

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while entered:  # a forward that failed
            entered.pop().close()


@contextmanager
def _computing_in_float32(model: nn.Module) -> Iterator[None]:
    layers = [part for part in model.modules() if hasattr(part, "compute_type_is_set")]
    stored = [(cast(Any, layer), cast(Any, layer).compute_dtype) for layer in layers]
    for layer, _ in stored:
        layer.compute_dtype = torch.float32
    try:
        yield
    finally:
        for layer, dtype in stored:
            layer.compute_dtype = dtype


@contextmanager
def _cast(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    stored = [(parameter, parameter.data) for parameter in parameters if parameter.is_floating_point()]
    for parameter, data in stored:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    weight = layer.get_base_layer().weight
    stored = weight.data
    weight.data = merged_weight(layer)
    layer.enable_adapters(False)
    try:
        yield
    finally:
        layer.enable_adapters(True)
        weight.data = stored
