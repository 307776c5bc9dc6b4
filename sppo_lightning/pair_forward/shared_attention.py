"""Attention over packed rows in which two responses share one prompt.

A response sees its prompt and itself, never the other response. Windows are counted in positions: both responses stand
right after the prompt. Shapes: B pairs, T tokens of the row, H query heads, K key heads, D head width; P and R tokens
of the longest prompt and response.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sppo_lightning.pair_forward.layouts import SharedPrompts
from sppo_lightning.policy import attention as attention_override
from sppo_lightning.policy.attention import CannotAttendError

NAME = "sppo_shared_prompts"
SINK = 8  # dimensions that a head gets for a sink's key: as many as kernels want a width to be a multiple of


class SharedAttention(ABC):
    """Attention of one micro-batch, the same object for all layers.

    Args:
        shared: where the row's segments lie.
    """

    def __init__(self, shared: SharedPrompts) -> None:
        self.shared = shared
        self.windows: set[int] = set()  # that layers have asked for

    @abstractmethod
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what each token reads, ``[T, H, D]``.

        Args:
            query: ``[T, H, D]``.
            key: ``[T, K, D]``.
            value: ``[T, K, D]``.
            scale: of the scores; ``None``: one over the root of D.
            window: tokens that a token sees, itself included; ``None``: all before it.
            sinks: ``[H]`` score of a further key, which every token sees and which holds nothing (GPT-OSS).

        Raises:
            CannotAttendError: if there are sinks, and this attention has none.
        """


class MaskedAttention(SharedAttention):
    """``scaled_dot_product_attention`` on padded segments: prompts causal, responses with a mask."""

    def __init__(self, shared: SharedPrompts) -> None:
        super().__init__(shared)
        self._masks: dict[int | None, tuple[Tensor | None, Tensor]] = {}
        self._sunk_masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what each token reads, ``[T, H, D]``."""
        if sinks is not None:
            return self._with_sinks(query, key, value, sinks, scale, window)
        return self._attend(query, key, value, scale, self._mask(window, query.device))

    def _with_sinks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Give each head a dimension in which only the sink's key is not 0, and each query its head's score there."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (sinks / scale).to(query.dtype)[:, None].expand(len(query), -1, -1)
        query = torch.cat([F.pad(query, (0, SINK - 1)), scores], dim=-1)
        key, value = F.pad(key, (0, SINK)), F.pad(value, (0, SINK))
        sink = F.pad(torch.ones_like(key[0, :1, :1]), (key.shape[-1] - 1, 0))
        found = self._attend(query, key, value, scale, self._sunk_mask(window, query.device), sink)
        return found[..., :-SINK]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        masks: tuple[Tensor | None, Tensor],
        sink: Tensor | None = None,
    ) -> Tensor:
        """Return what each token reads; the key ``sink``, of D numbers, comes last in every segment."""
        prompts, responses = self.shared.prompts, self.shared.responses
        (own_query, query), (own_key, key), (own_value, value) = map(self._segments, (query, key, value))
        key, value = _behind_prompt(own_key, key), _behind_prompt(own_value, value)
        if sink is not None:
            own_key, key = _and_last(own_key, sink), _and_last(key, sink)
            own_value, value = F.pad(own_value, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        read = _sdpa(own_query, own_key, own_value, masks[0], scale)
        answered = _sdpa(query, key, value, masks[1], scale)
        padded = [part.transpose(1, 2).flatten(0, 1) for part in (read, answered)]
        assert len(padded[0]) == prompts[0] * prompts[1]
        assert len(padded[1]) == responses[0] * responses[1]
        out = torch.cat(padded)
        return out if self.shared.places is None else _take(out, self.shared.places)

    def _segments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the padded prompts ``[B, heads, P, D]`` and responses ``[2B, heads, R, D]``."""
        if self.shared.padded is not None:
            assert self.shared.places is not None
            states = cast(Tensor, cast(Any, _Pad).apply(states, self.shared.padded, self.shared.places))
        prompts, responses = self.shared.prompts, self.shared.responses
        cut = prompts[0] * prompts[1]
        return (
            states[:cut].view(*prompts, *states.shape[1:]).transpose(1, 2),
            states[cut:].view(*responses, *states.shape[1:]).transpose(1, 2),
        )

    def _mask(self, window: int | None, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return which keys the prompts' tokens see (``None``: all before them), and which the responses' do."""
        (_, prompt), (_, response) = self.shared.prompts, self.shared.responses
        if window is not None and window >= prompt + response:
            window = None
        if window not in self._masks:
            before, own = torch.arange(prompt, device=device), torch.arange(response, device=device)
            lengths = self.shared.prompt_lengths[:, None, None]
            if self.shared.padded is None:
                lengths = lengths[:1]  # all are P
            in_prompt = (before < lengths).expand(-1, response, -1)
            in_response = (own[:, None] >= own).expand(len(lengths), -1, -1)
            prompt_mask = None
            if window is not None:
                in_prompt = in_prompt & (lengths + own[:, None] - before < window)
                in_response = in_response & (own[:, None] - own < window)
                if window < prompt:
                    apart = before[:, None] - before
                    prompt_mask = (apart >= 0) & (apart < window)
            mask = torch.cat([in_prompt, in_response], dim=-1)
            mask = mask if len(mask) == 1 else mask.repeat(2, 1, 1)
            self._masks[window] = prompt_mask, mask[:, None]
        return self._masks[window]

    def _sunk_mask(self, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what :meth:`_mask` does, with a key more that all see."""
        if window not in self._sunk_masks:
            prompt_mask, response_mask = self._mask(window, device)
            if prompt_mask is None:
                before = torch.arange(self.shared.prompts[1], device=device)
                prompt_mask = before[:, None] >= before
            self._sunk_masks[window] = (
                F.pad(prompt_mask, (0, 1), value=True),
                F.pad(response_mask, (0, 1), value=True),
            )
        return self._sunk_masks[window]


class VarlenAttention(SharedAttention):
    """``varlen_attn``, the flash kernel for segments of any length: no padding, no mask; CUDA, 16 bits.

    Every response gets a copy of its prompt's keys and values, which is linear in the tokens.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what each token reads, ``[T, H, D]``."""
        if sinks is not None:
            raise CannotAttendError("the kernel for segments of any length has no attention sinks")
        kernel = _varlen_kernel()
        options = {}
        if query.shape[1] != key.shape[1]:
            if _takes_grouped_heads(kernel):
                options["enable_gqa"] = True
            else:
                key, value = (
                    x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value)
                )
        prompt, response = self.shared.prompts[1], self.shared.responses[1]
        out: Tensor = kernel(
            query,
            self._with_prompts(key),
            self._with_prompts(value),
            self.shared.query_starts,
            self.shared.key_starts,
            max(prompt, response),
            prompt + response,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
        return out

    def _with_prompts(self, states: Tensor) -> Tensor:
        """Return the prompts' states, then each response's with its prompt's before them."""
        parts = torch.split(states, list(self.shared.lengths))
        count = self.shared.prompts[0]
        pieces = list(parts[:count])
        for number, response in enumerate(parts[count:]):
            pieces += [parts[number % count], response]
        return torch.cat(pieces)


def _varlen_kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise CannotAttendError("this torch has no variable-length attention") from error
    return varlen_attn


@cache
def _takes_grouped_heads(kernel: Any) -> bool:
    """Whether it has the argument, which torch 2.11 does not know yet; looked up once, not in every layer."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if groups > 1 and query.device.type != "cpu" and (mask is not None or not half):
        # of the kernels elsewhere only flash takes grouped heads as they are: 16 bits, no mask
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


def _behind_prompt(prompts: Tensor, responses: Tensor) -> Tensor:
    """Return ``[2B, heads, P + R, D]``: chosen and rejected responses, their prompt before them."""
    return torch.cat([prompts.repeat(2, 1, 1, 1), responses], dim=2)


def _and_last(keys: Tensor, key: Tensor) -> Tensor:
    """Return keys ``[B, heads, T + 1, D]``, the same one after those of each segment and head."""
    return torch.cat([keys, key.expand(*keys.shape[:2], 1, -1)], dim=2)


def _take(padded: Tensor, places: Tensor) -> Tensor:
    taken: Tensor = cast(Any, _Unpad).apply(padded, places)
    return taken


class _Pad(torch.autograd.Function):
    """Tokens onto padded places; padding holds the first token, which no mask lets through."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        # a gather, not the scatter with sums that autograd would do: each token has one place
        (places,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, places), None, None


class _Unpad(torch.autograd.Function):
    """Padded places back to tokens."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(states)
        return states.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        grad = grad_outputs[0].new_zeros(ctx.size, *grad_outputs[0].shape[1:])
        return grad.index_copy_(0, places, grad_outputs[0]), None


def _shared_prompts_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_attention: SharedAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Take the place of a model's attention; ``[1, heads, T, D]`` in, ``[1, T, H, D]`` out."""
    if shared_attention is None:
        raise CannotAttendError(
            f"{type(module).__name__} was called without the segments of its row: its model does not hand on what it "
            "is called with, or it was called outside the training forward (PolicySnapshot.sampling_model gives a "
            "policy to generate from)"
        )
    attention_override.check_call(module, attention_mask, others)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    states = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if sliding_window is not None:
        shared_attention.windows.add(sliding_window)
    return shared_attention(*states, scale=scaling, window=sliding_window, sinks=s_aux)[None], None


def attach(model: nn.Module) -> None:
    """Let a model attend through this module, until :func:`~sppo_lightning.policy.attention.detach`.

    Raises:
        CannotAttendError: if its attention cannot be replaced.
    """
    attention_override.attach(model, NAME, _shared_prompts_attention, {"full_attention", "sliding_attention"})


def leave_uncompiled() -> None:
    """Keep ``torch.compile`` out of the attention, whose kernels are compiled already."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, cast(Any, torch.compiler).disable(_shared_prompts_attention))
