"""Which forward serves a model is decided by a parity check at a run's start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.tiny import CONFIGS, alone, batch_of, gradients, new_model, pairs_of
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sppo_lightning.pair_forward import parity, shared_attention
from sppo_lightning.pair_forward.forwards import (
    PLAIN,
    SHARED,
    AutoForward,
    PairForward,
    PlainForward,
    SharedForward,
    VarlenForward,
)
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.pair_forward.shared_attention import MaskedAttention
from sppo_lightning.types import UserError

ADVICE = "use sppo_lightning.pair_forward.AutoForward"


def check(longest: int = 40, *, agree: Callable[[bool], bool] = bool) -> ParityCheck:
    return ParityCheck(longest, nullcontext, agree)


def refusal(model: nn.Module, **settings: Any) -> str:
    """Why a model keeps its own path; ``SharedForward`` says the same."""
    announced = AutoForward().prepare(model, check(**settings))
    assert announced.startswith(f"{PLAIN}: ")
    reason = announced.removeprefix(f"{PLAIN}: ")
    with pytest.raises(UserError) as refused:
        SharedForward().prepare(model, check(**settings))
    assert str(refused.value) == (f"model.pair_forward SharedForward: {reason}: {ADVICE}")
    return reason


def test_the_announcement() -> None:
    assert AutoForward().prepare(new_model(), check()) == f"{SHARED} (SharedForward)"
    assert SharedForward().prepare(new_model(), check()) == SHARED
    assert PlainForward().prepare(new_model(), check()) == PLAIN


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "Gemma2ForCausalLM cannot share a prompt (Gemma2Attention needs softcap)"),
        (
            "qwen3_5",
            "Qwen3_5ForCausalLM cannot share a prompt (Qwen3_5ForCausalLM has layers of linear_attention)",
        ),
        ("lfm2", "Lfm2ForCausalLM cannot share a prompt (Lfm2ForCausalLM has layers of conv)"),
        (
            "llama4",
            "Llama4ForCausalLM cannot share a prompt (Llama4ForCausalLM has layers of chunked_attention)",
        ),
    ],
)
def test_models_that_cannot_share(kind: str, reason: str) -> None:
    """They are trained by the plain path."""
    model, forward = new_model(kind).eval(), AutoForward()
    before = model.config._attn_implementation
    assert refusal(model) == reason
    assert model.config._attn_implementation == before
    expected = alone(model, pairs_of())
    forward.prepare(model, check())
    found = forward.token_logps(model, batch_of(pairs_of(), forward.layout(2)).rows)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert gradients(model, found)


class DropsArguments(LlamaDecoderLayer):
    """As layers of older models do."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        known = ("attention_mask", "position_ids", "past_key_values", "position_embeddings")
        return super().forward(hidden_states, **{name: kwargs[name] for name in known if name in kwargs})


def test_layers_that_drop_what_they_do_not_know() -> None:
    model: Any = new_model()
    model.model.layers[1].__class__ = DropsArguments
    assert refusal(model).startswith(
        "LlamaForCausalLM cannot share a prompt (LlamaAttention was called without the segments of its row: its model "
        "does not hand on what it is called with"
    )


def all_seen(own: Callable[..., Any]) -> Callable[..., Any]:
    def mask(self: MaskedAttention, window: int | None, device: torch.device) -> tuple[None, Tensor]:
        return None, torch.ones_like(own(self, window, device)[1])

    return mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, "0.0001"), (torch.bfloat16, "0.023")])
def test_attention_that_leaks_is_found_out(
    dtype: torch.dtype, tolerance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every response token sees what comes after it."""
    model = new_model("llama", dtype)
    assert AutoForward().prepare(model, check()).startswith(SHARED)
    monkeypatch.setattr(MaskedAttention, "_mask", all_seen(MaskedAttention._mask))
    reason = refusal(model)
    assert reason.startswith("LlamaForCausalLM gives other log-probs when a prompt is shared, by ")
    assert reason.endswith(f" nat per token (tolerance {tolerance})")


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_chunk_is_handed_on(kind: str) -> None:
    forward = AutoForward(3)
    forward.prepare(new_model(kind), check())
    assert forward.chosen.chunk == 3


def without_window(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *states, window, **options: own(self, *states, window=None, **options)


@pytest.mark.parametrize("longest", [30, 31])
def test_a_window_is_tried_if_a_sequence_may_be_longer(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 30 that is ignored shows only in longer sequences, which cost nothing where none may come."""
    monkeypatch.setattr(MaskedAttention, "__call__", without_window(MaskedAttention.__call__))
    config = copy.deepcopy(CONFIGS["mistral"])
    config.sliding_window = 30
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    read: list[int] = []

    def note(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        if given.get("position_ids") is None and given.get("input_ids") is not None:
            read.append(given["input_ids"].shape[-1])  # a sequence alone

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    announced = AutoForward().prepare(model, check(longest))
    assert len(read) == (4 if longest == 30 else 8)  # of a forward that is tried
    if longest == 30:
        assert announced.startswith(SHARED)
        assert max(read) <= 30
    else:
        assert announced.startswith(f"{PLAIN}: MistralForCausalLM gives other log-probs")
        assert max(read) > 31


def test_processes_decide_together() -> None:
    """Another process cannot share; the plain forward suits all, a forward that was asked for by name does not."""
    asked: list[bool] = []

    def agree(mine: bool) -> bool:
        asked.append(mine)
        return len(asked) == 2

    assert refusal(new_model(), agree=agree) == "it differs on another process"
    assert asked == [True, True, True]
    asked.clear()
    refusal(new_model("gemma2"), agree=agree)
    assert asked == [False, True, False]


def test_a_model_whose_log_probs_no_forward_matches_is_refused() -> None:
    """Its tokens see what comes after them, so that the padding of a row changes them."""
    model = new_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    wording = (
        r"^model.pair_forward PlainForward: LlamaForCausalLM gives other log-probs in padded rows, by \S+ nat per "
        r"token \(tolerance 0.0001\): no forward matches this model's own log-probs$"
    )
    for forward in (PlainForward(), AutoForward()):
        with pytest.raises(UserError, match=wording):
            forward.prepare(model, check())


def larger_logits(scale: float) -> nn.Module:
    """A model in bfloat16 whose kernels all round, the more so the larger its logits are."""
    model = new_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_roundings_of_large_logits_are_no_reason(scale: float) -> None:
    """Half a spacing of the best logit is what sound kernels of 16 bits may differ by."""
    for forward in (SharedForward(), PlainForward()):
        forward.prepare(larger_logits(scale), check())


def test_roundings_that_many_layers_make_more_of_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own log-probs move as far when its embeddings are off by half a rounding; a leak moves them more."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=32)).bfloat16()
    assert AutoForward().prepare(model, check()) == f"{SHARED} (SharedForward)"
    with monkeypatch.context() as patched:
        patched.setattr(parity, "_noise", lambda *args: 0.0)
        assert "gives other log-probs when a prompt is shared" in refusal(model)
    monkeypatch.setattr(MaskedAttention, "_mask", all_seen(MaskedAttention._mask))
    assert "gives other log-probs when a prompt is shared" in refusal(model)


def test_a_window_that_the_attention_does_not_get_is_found_out_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of a fresh model: what lies behind the window hardly counts, and log-probs alone would not tell."""
    config = copy.deepcopy(CONFIGS["mistral"])
    config.sliding_window, config.initializer_range = 30, 0.02
    torch.manual_seed(0)
    model = MistralForCausalLM(config).bfloat16()
    own = shared_attention._shared_prompts_attention

    def without_its_window(*states: Any, sliding_window: int | None = None, **others: Any) -> Any:
        return own(*states, **others)

    monkeypatch.setattr(shared_attention, "_shared_prompts_attention", without_its_window)
    monkeypatch.delitem(AttentionInterface._global_mapping, shared_attention.NAME, raising=False)
    try:
        assert AutoForward().prepare(model, check(30)) == f"{SHARED} (SharedForward)"
        assert refusal(model, longest=31) == (
            "MistralForCausalLM cannot share a prompt (it does not tell its attention of its window of 30 tokens)"
        )
    finally:
        AttentionInterface._global_mapping.pop(shared_attention.NAME, None)


class KeepsAllLogits(LlamaForCausalLM):
    """Takes ``logits_to_keep``, if at all, without heeding it."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)


class TakesNoExtras(LlamaForCausalLM):
    """Knows no ``logits_to_keep``."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache)


@pytest.mark.parametrize("kind", [KeepsAllLogits, TakesNoExtras])
def test_a_model_that_gives_all_logits_is_compared_at_its_responses(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    for forward in (SharedForward(), PlainForward()):
        forward.prepare(kind(CONFIGS["llama"]), check())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize("forward_class", [SharedForward, AutoForward])
def test_memory_that_runs_out_is_no_reason_to_take_another_path(
    error: Exception, forward_class: type[PairForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(MaskedAttention, "__call__", run_out)
    model = new_model()
    with pytest.raises(type(error), match=str(error)):
        forward_class().prepare(model, check())
    assert model.config._attn_implementation == "sdpa"


def test_the_varlen_path_off_cuda() -> None:
    """torch's kernel refuses; nothing but CUDA is tried with it by itself."""
    with pytest.raises(
        UserError, match=r"^model\.pair_forward VarlenForward: LlamaForCausalLM cannot share a prompt"
    ):
        VarlenForward().prepare(new_model(), check())


def test_a_check_leaves_no_trace() -> None:
    model = new_model().train()
    before = torch.get_rng_state()
    AutoForward().prepare(model, check())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
