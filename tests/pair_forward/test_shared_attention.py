"""Attention over a row in which two responses share a prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from support.kernels import looped_kernel
from support.models import tiny_config
from support.tiny import batch_of, new_model, pairs_of
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig, LlamaForCausalLM

from sppo_lightning.pair_forward import shared_attention
from sppo_lightning.pair_forward.layouts import SharedLayout, SharedPrompts
from sppo_lightning.pair_forward.shared_attention import (
    MaskedAttention,
    SharedAttention,
    VarlenAttention,
    attach,
)
from sppo_lightning.policy.attention import CannotAttendError, detach

HEADS, WIDTH = 4, 8
Lengths = Sequence[tuple[int, int, int]]  # tokens of prompt, chosen, rejected
RAGGED = [(5, 3, 1), (1, 6, 2), (9, 1, 4)]
SHAPES: dict[str, Lengths] = {
    "ragged": RAGGED,
    "alike": [(5, 3, 3), (5, 3, 3)],
    "alike but for one prompt": [(5, 3, 3), (4, 3, 3)],
    "one pair": [(4, 2, 6)],
    "no rejected": [(4, 2, 0), (2, 1, 3)],
    "no responses": [(4, 0, 0), (2, 0, 0)],
    "one token each": [(1, 1, 1)],
}
WINDOWS = [None, 1, 3, 6, 50]


def shared_prompts(lengths: Lengths) -> SharedPrompts:
    shared = batch_of(pairs_of(lengths), SharedLayout()).rows.shared
    assert shared is not None
    return shared


def drawn(lengths: Lengths, *, key_heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of every token, float64, to be differentiated."""
    tokens = sum(map(sum, lengths))
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int) -> Tensor:
        return torch.randn(tokens, heads, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()

    return states(HEADS), states(key_heads), states(key_heads)


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    *,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Query after query, key after key; a sink is a score that takes its share of a token's attention.

    A token of a sequence sees the tokens of that sequence that stand at most ``window - 1`` positions before it; a
    sequence is a prompt with one response.
    """
    prompts, chosen, rejected = zip(*lengths, strict=True)
    tokens = [(pair, None, offset) for pair, length in enumerate(prompts) for offset in range(length)]
    tokens += [
        (pair, side, prompts[pair] + offset)
        for side, sizes in enumerate((chosen, rejected))
        for pair, length in enumerate(sizes)
        for offset in range(length)
    ]
    scale = WIDTH**-0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    rows = []
    for number, (pair, side, position) in enumerate(tokens):
        seen = [
            other
            for other, (its_pair, its_side, its_position) in enumerate(tokens)
            if its_pair == pair and its_side in (None, side) and its_position <= position
            if window is None or position - its_position < window
        ]
        heads = []
        for head in range(query.shape[1]):
            scores = scale * key[seen, head // group] @ query[number, head]
            scores = scores if sinks is None else torch.cat([scores, sinks[head : head + 1]])
            heads.append(torch.softmax(scores, 0)[: len(seen)] @ value[seen, head // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def kernel_without_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """As in torch 2.11."""
    sizes = (cu_seq_q, cu_seq_k, max_q, max_k)
    return looped_kernel(query, key, value, *sizes, scale=scale, window_size=window_size)


def same(found: Tensor, expected: Tensor, leaves: Sequence[Tensor], *, gradient: float) -> None:
    """Values to 1e-12, gradients to ``gradient`` of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=gradient * max(1.0, float(other.abs().max())))


# --------------------------------------------------------------------- masked


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_attention_is_the_definition(shape: str, key_heads: int) -> None:
    """torch's masked kernel on the CPU keeps some float32 in backward."""
    lengths, leaves = SHAPES[shape], drawn(SHAPES[shape], key_heads=key_heads)
    attention = MaskedAttention(shared_prompts(lengths))
    for window, scale in zip(WINDOWS, (None, 0.3, None, 0.3, 0.3), strict=True):
        found = attention(*leaves, scale=scale, window=window)
        same(found, by_definition(*leaves, lengths, scale=scale, window=window), leaves, gradient=1e-6)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_sinks_are_the_definition(shape: str, key_heads: int) -> None:
    """One of each head, also where it takes nearly all; the sinks' own gradient too."""
    lengths, leaves = SHAPES[shape], drawn(SHAPES[shape], key_heads=key_heads)
    sinks = torch.tensor([0.0, -3.0, 1.5, 6.0], dtype=torch.float64, requires_grad=True)
    attention = MaskedAttention(shared_prompts(lengths))
    for window, scale in zip(WINDOWS, (None, 0.3, None, 0.3, 0.3), strict=True):
        options: dict[str, Any] = {"scale": scale, "window": window, "sinks": sinks}
        found = attention(*leaves, **options)
        same(found, by_definition(*leaves, lengths, **options), [*leaves, sinks], gradient=1e-6)


def test_layers_with_and_without_sinks_share_an_attention() -> None:
    leaves, sinks = drawn(RAGGED), torch.zeros(HEADS, dtype=torch.float64)
    attention = MaskedAttention(shared_prompts(RAGGED))
    for given in (None, sinks, None, sinks):
        options: dict[str, Any] = {"scale": None, "window": 3, "sinks": given}
        same(attention(*leaves, **options), by_definition(*leaves, RAGGED, **options), leaves, gradient=1e-6)


def test_the_varlen_kernel_has_no_sinks() -> None:
    attention, leaves = VarlenAttention(shared_prompts(RAGGED)), drawn(RAGGED)
    with pytest.raises(CannotAttendError, match="has no attention sinks"):
        attention(*leaves, scale=None, window=None, sinks=torch.zeros(HEADS))


@pytest.mark.parametrize("window", [None, 3])
def test_masked_attention_passes_gradcheck(window: int | None) -> None:
    lengths = [(3, 1, 2), (2, 2, 0)]
    attention = MaskedAttention(shared_prompts(lengths))
    leaves = drawn(lengths, key_heads=2)
    assert torch.autograd.gradcheck(lambda *states: attention(*states, scale=None, window=window), leaves)


def test_what_stands_in_padding_is_never_read() -> None:
    """Padding holds copies of token 0; were it another token, nothing would change, gradients included."""
    shared, leaves = shared_prompts(RAGGED), drawn(RAGGED)
    assert shared.padded is not None
    assert shared.places is not None
    other = torch.full_like(shared.padded, len(leaves[0]) - 1)
    other[shared.places] = shared.padded[shared.places]
    assert not torch.equal(other, shared.padded)
    for window in WINDOWS:
        found, expected = (
            MaskedAttention(given)(*leaves, scale=None, window=window)
            for given in (shared._replace(padded=other), shared)
        )
        same(found, expected, leaves, gradient=0)


# --------------------------------------------------------------------- varlen


@pytest.mark.parametrize("kernel", [looped_kernel, kernel_without_groups], ids=["groups", "no groups"])
@pytest.mark.parametrize("shape", SHAPES)
def test_varlen_attention_equals_masked_attention(
    shape: str, kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "_varlen_kernel", lambda: kernel)
    shared = shared_prompts(SHAPES[shape])
    varlen, masked = VarlenAttention(shared), MaskedAttention(shared)
    for key_heads, (window, scale) in product((HEADS, 2), ((None, None), (1, 0.3), (3, None), (6, 0.3))):
        leaves = drawn(SHAPES[shape], key_heads=key_heads)
        found, expected = (each(*leaves, scale=scale, window=window) for each in (varlen, masked))
        same(found, expected, leaves, gradient=1e-6)


def test_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(CannotAttendError, match=r"^this torch has no variable-length attention$"):
        VarlenAttention(shared_prompts(RAGGED))(*drawn(RAGGED), scale=None, window=None)


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_the_kernel_itself(window: int | None, key_heads: int) -> None:
    """Against float32 on the same bfloat16 values, to a few roundings of bfloat16."""
    shared = move_data_to_device(shared_prompts(RAGGED), "cuda")
    results = []
    for attention, dtype in ((VarlenAttention, torch.bfloat16), (MaskedAttention, torch.float32)):
        leaves = [
            states.detach().bfloat16().to("cuda", dtype).requires_grad_()
            for states in drawn(RAGGED, key_heads=key_heads)
        ]
        out = attention(shared)(*leaves, scale=0.3, window=window)
        out.float().square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03)


# --------------------------------------------------------- in place of a model's own


MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


def run(model: Any, attention: type[SharedAttention] | None = MaskedAttention, **options: Any) -> Tensor:
    rows = batch_of(pairs_of(), SharedLayout()).rows
    assert rows.shared is not None
    if attention is not None:
        options["shared_attention"] = attention(rows.shared)
    options = {"attention_mask": MASK, **options}
    output = model(input_ids=rows.input_ids, position_ids=rows.position_ids, **options)
    return output.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_gets_its_own_attention_back(implementation: str) -> None:
    model = new_model()
    model.set_attn_implementation(implementation)
    for _ in range(2):
        attach(model)
        attach(model)
        assert model.config._attn_implementation == shared_attention.NAME
        run(model)
        detach(model)
        detach(model)
        assert model.config._attn_implementation == implementation


def test_a_model_that_never_attended_otherwise_is_left_alone() -> None:
    model = new_model()
    detach(model)
    assert model.config._attn_implementation == "sdpa"


class Noting(SharedAttention):
    """Attends to nothing, and notes the dtypes that it gets."""

    def __call__(self, *states: Tensor, **options: Any) -> Tensor:
        self.dtypes = [each.dtype for each in states]
        return states[0]


def test_autocast_reaches_all_states() -> None:
    """Rotary embeddings and norms leave float32 behind, which a kernel for 16 bits would refuse."""
    noting, states = (
        Noting(shared_prompts(RAGGED)),
        [each[None].transpose(1, 2).float() for each in drawn(RAGGED)],
    )
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            shared_attention._shared_prompts_attention(new_model(), *states, MASK, shared_attention=noting)
        assert noting.dtypes == [dtype] * 3


def refused(model: Any, message: str, **options: Any) -> None:
    before = model.config._attn_implementation

    def share() -> None:
        attach(model)
        run(model, **options)

    with pytest.raises(CannotAttendError, match=f"^{message}$"):
        share()
    detach(model)
    assert model.config._attn_implementation == before


def test_a_call_that_does_not_reach_the_attention() -> None:
    """Also one outside the training forward."""
    message = (
        "LlamaAttention was called without the segments of its row: its model does not hand on what it is called "
        r"with, or it was called outside the training forward \(PolicySnapshot\.sampling_model gives a policy to "
        r"generate from\)"
    )
    refused(new_model(), message, attention=None)


@pytest.mark.parametrize(("kind", "layers"), [("qwen3_5", "linear_attention"), ("lfm2", "conv")])
def test_layers_that_are_no_attention_are_named(kind: str, layers: str) -> None:
    model = new_model(kind)
    refused(model, rf"{type(model).__name__} has layers of {layers}")


def test_a_soft_cap_is_named() -> None:
    refused(new_model("gemma2"), "Gemma2Attention needs softcap")


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 1, 9)])
def test_a_mask_of_the_models_own_is_named(mask: Tensor | None) -> None:
    """What a model adds to its mask would be lost, with the gradient of whatever made it."""
    refused(new_model(), "LlamaAttention changes its attention mask", attention_mask=mask)


def test_dropout_is_named() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(attention_dropout=0.5))
    refused(model.train(), "LlamaAttention needs dropout")
    attach(model.eval())
    assert run(model).isfinite().all()
    detach(model)


@pytest.mark.parametrize("asked", ["softcap", "position_bias", "cache"])
def test_what_else_a_model_asks_for_is_named(asked: str) -> None:
    refused(new_model(), f"LlamaAttention needs {asked}", **{asked: torch.zeros(1)})


def test_attention_that_cannot_be_replaced() -> None:
    config = FalconConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    refused(
        AutoModelForCausalLM.from_config(config), "FalconForCausalLM does not let its attention be replaced"
    )
