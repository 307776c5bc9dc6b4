"""Log-probs of pairs: the same however prompts are shared, padded and batched, or the model's own path is kept."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernels import looped_kernel
from support.sampling import greedy
from support.tiny import (
    LENGTHS,
    Source,
    alone,
    batch_of,
    close_gradients,
    gradients,
    new_model,
    pairs_of,
    random_tokens,
)
from torch import Tensor, nn

from sppo_lightning.pair_forward import shared_attention
from sppo_lightning.pair_forward.forwards import (
    PLAIN,
    SHARED,
    AutoForward,
    PairForward,
    PlainForward,
    SharedForward,
    VarlenForward,
)
from sppo_lightning.pair_forward.layouts import PlainLayout
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy, sampling_copy
from sppo_lightning.training.batching import PairBatch, collate
from sppo_lightning.types import PreferencePair

PAD = 2
SHARING = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma3", "gemma3_capped", "granite", "cohere", "cohere2"),
    *("gpt2", "gpt_oss", "qwen3_moe"),
]
NO_FLOAT64 = {"gpt_oss", "qwen3_moe"}  # whose experts are multiplied by a kernel without it
FORWARDS: list[type[PairForward]] = [PlainForward, SharedForward, AutoForward]
EXACT = [PlainForward, SharedForward]


def check(longest: int = 40, *, agree: Callable[[bool], bool] = bool) -> ParityCheck:
    return ParityCheck(longest, nullcontext, agree)


def read(forward: PairForward, model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """Log-prob of each response token, ``[N]``."""
    return forward.token_logps(model, batch_of(pairs, forward.layout(PAD)).rows)


def sums(forward: PairForward, model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """Log-prob of each response, ``[2B]``."""
    return torch.cat(list(forward.logps(model, batch_of(pairs, forward.layout(PAD)).rows)))


def close(found: Tensor, expected: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=0, atol=atol)


# ------------------------------------------------------- each sequence on its own


@functools.cache
def expected_alone(kind: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model = new_model(kind, dtype).eval()
    logps = alone(model, pairs_of())
    return logps.detach(), gradients(model, logps)


@pytest.mark.parametrize("forward_class", FORWARDS)
@pytest.mark.parametrize("kind", SHARING)
def test_equals_each_sequence_on_its_own(kind: str, forward_class: type[PairForward]) -> None:
    """Log-probs per token, gradients by each parameter's largest.

    A window is 6: prompts of 7 and 9 tokens are longer, one of 2 with its response of 9 is. torch's masked kernel on
    the CPU keeps some float32 in backward.
    """
    dtypes = [(torch.float64, 1e-10, 1e-6), (torch.float32, 1e-5, 1e-5)]
    for dtype, value, gradient in dtypes[kind in NO_FLOAT64 :]:
        model, forward = new_model(kind, dtype).eval(), forward_class()
        announced = forward.prepare(model, check())
        assert announced.startswith(PLAIN if forward_class is PlainForward else SHARED)
        found = read(forward, model, pairs_of())
        assert found.dtype == dtype
        exact = torch.float32 if kind in NO_FLOAT64 else torch.float64
        close(found, expected_alone(kind, exact)[0], atol=value)
        close_gradients(gradients(model, found), expected_alone(kind, dtype)[1], tolerance=gradient)


@pytest.mark.parametrize("forward_class", FORWARDS)
@pytest.mark.parametrize("kind", ["opt", "gemma4"])
def test_models_whose_decoder_stands_elsewhere_or_returns_more(
    kind: str, forward_class: type[PairForward]
) -> None:
    model, forward = new_model(kind).eval(), forward_class()
    expected = alone(model, pairs_of())
    forward.prepare(model, check())
    close(read(forward, model, pairs_of()), expected, atol=1e-5)


@pytest.mark.parametrize("forward_class", FORWARDS)
def test_entropy_of_responses_is_the_same_however_a_prompt_is_read(forward_class: type[PairForward]) -> None:
    model, forward, pairs = new_model("llama", torch.float64).eval(), forward_class(chunk=3), pairs_of()
    forward.prepare(model, check())
    rows = batch_of(pairs, forward.layout(PAD)).rows
    found, plain = (forward.read_pairs(model, rows, with_entropy=asked) for asked in (True, False))
    forward.release(model)
    assert plain.collision_entropy is None
    assert torch.equal(plain.tokens.chosen, found.tokens.chosen)
    assert found.collision_entropy is not None
    for place, pair in enumerate(pairs):
        for side, response in zip(
            found.collision_entropy, (pair.chosen_token_ids, pair.rejected_token_ids), strict=True
        ):
            ids = torch.tensor([[*pair.prompt_token_ids, *response]])
            logits = model(input_ids=ids).logits[0, -len(response) - 1 : -1]
            expected = -logits.softmax(-1).square().sum(-1).log().sum()
            assert side[place].item() == pytest.approx(expected.item(), abs=1e-9)


SHAPES = {
    "alike": [(5, 4, 4), (5, 4, 4), (5, 4, 4)],
    "one pair": [(9, 8, 3)],
    "one token": [(5, 1, 1), (8, 1, 6)],
    "prompts of one token": [(1, 1, 1), (1, 7, 2)],
    "a response without tokens": [(5, 0, 3), (8, 2, 0)],
    "only responses without tokens": [(5, 0, 0), (8, 0, 0)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("forward_class", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gemma3_capped"])
def test_every_shape(kind: str, forward_class: type[PairForward], shape: str) -> None:
    model, pairs, forward = new_model(kind, torch.float64).eval(), pairs_of(SHAPES[shape]), forward_class()
    rows = batch_of(pairs, forward.layout(PAD)).rows
    if rows.shared is not None:
        assert (rows.shared.padded is None) == (shape == "alike")
    expected = alone(model, pairs)
    found = forward.token_logps(model, rows)
    close(found, expected, atol=1e-10)
    if len(found):
        close_gradients(gradients(model, found), gradients(model, expected), tolerance=1e-6)
    responses = sums(forward, model, pairs)
    responses.sum().backward()
    assert responses.dtype == torch.float64
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for total, response in zip(
        responses.tolist(),
        [p.chosen_token_ids for p in pairs] + [p.rejected_token_ids for p in pairs],
        strict=True,
    ):
        assert (total == 0) == (not response)


# ------------------------------------------------------------ what is next to it


@pytest.mark.parametrize("forward_class", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_batch_size_order_fillers_and_padding_change_nothing(
    kind: str, forward_class: type[PairForward]
) -> None:
    model, pairs, forward = new_model(kind), pairs_of(), forward_class()
    count = len(pairs)

    def run(batches: Sequence[PairBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs ``[2, B]``, and gradients of the weighted sum over pairs of 2 chosen - rejected."""
        parts = [forward.logps(model, batch.rows) for batch in batches]
        model.zero_grad()
        for part, batch in zip(parts, batches, strict=True):
            (batch.weights * (2 * part.chosen - part.rejected)).sum().backward()
        found = torch.stack([torch.cat(side) for side in zip(*parts, strict=True)])
        return found.detach(), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    layout = forward.layout(PAD)
    whole = batch_of(pairs, layout)
    expected, expected_gradients = run([whole])
    order = [3, 0, 4, 2, 1]
    longer = pairs_of([(60, 20, 1)])
    variants: list[tuple[list[PairBatch], Callable[[Tensor], Tensor]]] = [
        ([batch_of([pair], layout) for pair in pairs], lambda logps: logps),
        ([batch_of(pairs[:2], layout), batch_of(pairs[2:], layout)], lambda logps: logps),
        (
            [batch_of([pairs[row] for row in order], layout)],
            lambda logps: logps[:, torch.tensor(order).argsort()],
        ),
        (
            [collate([*pairs, *longer, pairs[0]], layout=layout, real=count, slot=whole.slot)],
            lambda logps: logps[:, :count],
        ),
    ]
    for batches, back in variants:
        found, found_gradients = run(batches)
        close(back(found), expected, atol=1e-5)
        close_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("forward_class", EXACT)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
@torch.no_grad()
def test_the_other_response_is_invisible(kind: str, forward_class: type[PairForward]) -> None:
    """Other tokens change no bit; another length may change the order of sums."""
    model, pairs, forward = new_model(kind), pairs_of(), forward_class()
    count = len(pairs)
    before = sums(forward, model, pairs)

    def with_rejected(lengths: Sequence[int]) -> list[PreferencePair]:
        return [
            PreferencePair(p.prompt_id, p.prompt_token_ids, p.chosen_token_ids, rejected, "c", "r", 1.0, 0.0)
            for p, rejected in zip(pairs, random_tokens(*lengths, seed=77), strict=True)
        ]

    same_length = sums(forward, model, with_rejected([rejected for _, _, rejected in LENGTHS]))
    assert torch.equal(same_length[:count], before[:count])
    assert (same_length[count:] != before[count:]).all()
    close(sums(forward, model, with_rejected([2, 11, 1, 3, 7]))[:count], before[:count], atol=1e-5)

    def swapped(given: Sequence[PreferencePair]) -> list[PreferencePair]:
        return [
            PreferencePair(
                p.prompt_id, p.prompt_token_ids, p.rejected_token_ids, p.chosen_token_ids, "r", "c", 0.0, 1.0
            )
            for p in given
        ]

    close(sums(forward, model, swapped(pairs)), before.roll(count), atol=1e-5)


@torch.no_grad()
def test_the_padding_token_is_never_read() -> None:
    model, batches = new_model(), [batch_of(pairs_of(), PlainLayout(pad)) for pad in (PAD, 77)]
    assert not torch.equal(batches[0].rows.input_ids, batches[1].rows.input_ids)
    first, second = (PlainForward().token_logps(model, batch.rows) for batch in batches)
    assert torch.equal(first, second)


# --------------------------------------------- checkpointing, adapters, autocast


def loaded(folder: Path, *, lora: bool, checkpointing: bool = False) -> Any:
    """A policy in training mode; an adapter's weights are not zero."""
    torch.manual_seed(0)
    adapter = LoRAConfig(rank=4, alpha=8) if lora else None
    config = PolicyConfig(str(folder), lora=adapter, gradient_checkpointing=checkpointing)
    model = load_policy(config, compute_dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def count_runs(model: nn.Module, runs: list[str]) -> None:
    """Note every pass through an attention block or the head in ``runs``."""
    for name, module in model.named_modules():
        part = name.split(".")[-1]
        if part in ("self_attn", "lm_head"):
            module.register_forward_hook(lambda *_, part=part: runs.append(part))  # type: ignore[misc]


@pytest.mark.parametrize("forward_class", EXACT)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_computes_again_and_changes_no_gradient(
    tiny_policy: Path, lora: bool, forward_class: type[PairForward]
) -> None:
    """Each of the two layers runs twice, and so do all chunks of the head but the last."""
    found = []
    for checkpointing, chunk, layers in ((False, None, 2), (True, 5, 4)):
        model = loaded(tiny_policy, lora=lora, checkpointing=checkpointing)
        runs: list[str] = []
        count_runs(model, runs)
        found.append(gradients(model, read(forward_class(chunk), model, pairs_of())))
        assert runs.count("self_attn") == layers
        assert runs.count("lm_head") == (1 if chunk is None else 2 * -(-38 // chunk) - 1)
    close_gradients(found[1], found[0])


@pytest.mark.parametrize("forward_class", FORWARDS)
def test_an_adapter_counts_and_switches_off(tiny_policy: Path, forward_class: type[PairForward]) -> None:
    model, forward = loaded(tiny_policy, lora=True), forward_class()
    forward.prepare(model, check())
    expected = alone(model, pairs_of())
    found = read(forward, model, pairs_of())
    close(found, expected, atol=1e-5)
    close_gradients(gradients(model, found), gradients(model, expected))
    base = alone(loaded(tiny_policy, lora=False), pairs_of())
    assert float((found - base).detach().abs().max()) > 0.1
    with model.disable_adapter():
        close(read(forward, model, pairs_of()), base, atol=1e-5)


@pytest.mark.parametrize("forward_class", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gemma3_capped", "granite"])
def test_bfloat16_autocast(kind: str, forward_class: type[PairForward]) -> None:
    """Within 0.05 nat per token of float32 on average, and no further than twice as far as the model's own."""
    model = new_model(kind)
    exact = expected_alone(kind, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        own = alone(model, pairs_of())
        found = read(forward_class(3), model, pairs_of())
    assert found.dtype == torch.float32
    drift, own_drift = (float((logps.detach() - exact).abs().mean()) for logps in (found, own))
    assert drift < min(0.05, 2 * own_drift)
    exact_gradients, found_gradients = expected_alone(kind, torch.float32)[1], gradients(model, found)
    for name, gradient in exact_gradients.items():
        assert (
            torch.nn.functional.cosine_similarity(found_gradients[name].flatten(), gradient.flatten(), 0)
            > 0.98
        )


@pytest.mark.parametrize("kind", ["llama", "gemma3_capped"])
def test_the_varlen_path_equals_each_sequence_on_its_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a kernel of the test's own, once a layer."""
    calls: list[int] = []

    def kernel(*states: Any, **options: Any) -> Tensor:
        calls.append(1)
        return looped_kernel(*states, **options)

    monkeypatch.setattr(shared_attention, "_varlen_kernel", lambda: kernel)
    model, forward = new_model(kind, torch.float64).eval(), VarlenForward()
    close(read(forward, model, pairs_of()), expected_alone(kind, torch.float64)[0], atol=1e-10)
    assert len(calls) == 2


# --------------------------------------------------------- training and sampling


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_sampling_between_training_passes(kind: str) -> None:
    """After :meth:`release` model and copies sample as before; what is trained next is the same again."""
    model, forward, prompts = new_model(kind), AutoForward(), random_tokens(3, 9)
    samples = greedy(Source(model), prompts)
    forward.prepare(model, check())
    assert greedy(Source(model), prompts) == samples
    logps = read(forward, model, pairs_of())
    trained = gradients(model, logps)
    forward.release(model)
    assert model.config._attn_implementation == "sdpa"
    assert greedy(Source(model), prompts) == samples
    for copied in (sampling_copy(model, torch.float32), copy.deepcopy(model)):
        assert copied.config._attn_implementation == "sdpa"
        assert greedy(Source(copied), prompts) == samples
    again = read(forward, model.train(), pairs_of())
    assert torch.equal(again, logps)
    close_gradients(gradients(model, again), trained, tolerance=0)
