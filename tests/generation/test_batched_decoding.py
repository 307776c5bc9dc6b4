"""May a model decode sequences in a batch: checked against what it makes of each alone."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.sampling import EARLY, NEVER, PROMPTS, STATEFUL, answer, engine, forwards, greedy, sampled
from support.tiny import OTHER_CONFIGS, TRAINED_CONFIGS, Source, new_model, random_tokens, tiny_model
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from sppo_lightning.generation import HFGenerator, SampleRequest, batched_decoding, hf
from sppo_lightning.generation.batched_decoding import Batching, check_batching
from sppo_lightning.generation.cache import ReservedLayer
from sppo_lightning.generation.cache_size import RowBytes
from sppo_lightning.generation.steps import common_prefix
from sppo_lightning.types import UserError

TAKEN = sorted({*TRAINED_CONFIGS, *OTHER_CONFIGS} - {"bart", "bert"})
REFUSAL = r"^HFGenerator cannot sample from {} \(batched decoding gives other log-probs, by "


@pytest.mark.parametrize("kind", TAKEN)
def test_prompts_of_any_length_share_a_batch(kind: str) -> None:
    assert check_batching(tiny_model(kind)).padded


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("llama", RowBytes(2 * 2 * 2 * 8 * 4, 0)),
        ("gemma3", RowBytes(1, 2 * 2 * 2 * 8 * 4 * 5)),  # windows of 6, full before the check ends
        ("mamba2", RowBytes(1, 2 * 4 * (4 * 16 * 8 + 4 * 80))),
    ],
)
def test_what_a_row_takes_by_hand(kind: str, row: RowBytes) -> None:
    """Keys and values of 2 layers, 2 heads of 8 numbers, 4 bytes each; or states."""
    assert check_batching(tiny_model(kind)).row == row


def test_a_state_and_keys_side_by_side() -> None:
    """One of two layers attends; half of it in 16 bits, but for what is kept in float32."""
    whole = check_batching(tiny_model("qwen3_5")).row
    assert whole.token == 2 * 2 * 8 * 4
    assert whole.fixed > 1000
    half = check_batching(new_model("qwen3_5", torch.bfloat16).eval()).row
    assert half.token == whole.token // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gemma3"])
def test_roundings_are_no_failure(kind: str, dtype: torch.dtype) -> None:
    assert check_batching(new_model(kind, dtype).eval()).padded


def less_likely(logits: torch.Tensor, nats: float) -> torch.Tensor:
    """Lower the logit of each place's most likely token, so that its log-prob falls by ``nats``."""
    best, tokens = logits.log_softmax(-1).max(-1, keepdim=True)
    log_odds = [logp - torch.log1p(-logp.exp()) for logp in (best - nats, best)]
    return logits.scatter_add(-1, tokens, log_odds[0] - log_odds[1])


@pytest.mark.parametrize("apart", [0.14, 20.0])
def test_roundings_that_many_layers_make_more_of_are_no_failure(
    apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own log-probs move by more than 0.14 when its embeddings are off by half a rounding; not by 20."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=96)).eval().bfloat16()
    together = batched_decoding._together

    def rounded_otherwise(*args: Any) -> Any:
        found, row = together(*args)
        return less_likely(found, apart), row

    monkeypatch.setattr(batched_decoding, "_together", rounded_otherwise)
    with nullcontext() if apart < 1 else pytest.raises(UserError, match=REFUSAL.format("LlamaForCausalLM")):
        assert check_batching(model).padded
    monkeypatch.setattr(batched_decoding, "off_by_a_rounding", lambda model, dtype: nullcontext())
    with pytest.raises(UserError, match=r" \(tolerance 0\.019\)"):
        check_batching(model)


# ------------------------------------------------------------ models that heed padding


def test_a_model_that_counts_padding_gets_prompts_of_one_length(caplog: pytest.LogCaptureFixture) -> None:
    """Bart tells positions from the tokens that it was given."""
    source = Source(tiny_model("bart"), EARLY)
    with caplog.at_level(logging.INFO, batched_decoding.__name__):
        generator = engine(source)
    assert (
        "BartForCausalLM reads prompts of one length at a time: where they are padded, batched decoding"
        in caplog.text
    )
    lengths = (4, 9, 4, 9, 9)
    requests = [SampleRequest(prompt, (0, 1)) for prompt in random_tokens(*lengths, seed=3)]
    with forwards(source.model) as shapes:
        found = answer(generator, requests)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 4), (3, 9)]
    for request, responses in zip(requests, found, strict=True):
        assert answer(engine(source, batch_size=1), [request]) == [responses]


def test_greedy_answers_of_such_a_model_are_its_own() -> None:
    model = tiny_model("bart")
    for prompt, one in zip(PROMPTS, greedy(Source(model, NEVER), PROMPTS), strict=True):
        ids = torch.tensor([[*prompt, *one.token_ids]])
        assert model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(
            one.token_ids
        )


# -------------------------------------------------------------- models that are refused


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Bert as it is usually configured reads both ways: what is kept of a token is not what it becomes."""
    with pytest.raises(UserError, match=REFUSAL.format("BertLMHeadModel")) as error:
        engine(Source(tiny_model("bert")))
    assert "OpenAIServerGenerator" in str(error.value)


def test_a_model_that_raises_is_refused_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise ValueError("wants a cache of its own\nand more")

    model = new_model().eval()
    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(
        UserError,
        match=r"^HFGenerator cannot sample from LlamaForCausalLM \(wants a cache of its own\): use ",
    ):
        check_batching(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", *STATEFUL])
def test_a_cache_whose_rows_are_mixed_up_is_refused(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row reads on behind another prompt, or behind another row's response."""
    reorder = DynamicCache.reorder_cache
    model = new_model(kind, dtype).eval()
    for wrong in ([1, 1, 0], [0, 2]):

        def mixed(cache: DynamicCache, rows: Any, wrong: list[int] = wrong) -> None:
            reorder(cache, torch.tensor(wrong) if len(rows) == len(wrong) else rows)

        with monkeypatch.context() as patch:
            patch.setattr(DynamicCache, "reorder_cache", mixed)
            with pytest.raises(UserError, match=REFUSAL.format(type(model).__name__)):
                check_batching(model)
    assert check_batching(model).padded


def test_a_full_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(batched_decoding, "_together", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_batching(tiny_model())


# -------------------------------------------------------------------------- the engine


def test_a_model_is_checked_once() -> None:
    source = Source(tiny_model(), EARLY)
    with forwards(source.model) as shapes:
        generator = engine(source)
        read = 1 + batched_decoding.BEFORE + batched_decoding.AFTER + len(batched_decoding.SOURCE)
        read += 2 + 3  # two prompts and a token more, read whole, and what they begin with by itself
        assert len(shapes) == read
        generator.unload()
        generator.load(source)
        assert len(shapes) == read


def test_states_count_as_the_tokens_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 9 + 12 tokens at one byte each, and 79 bytes of states: three of them in 300 bytes, two in 299."""
    source = Source(tiny_model(), NEVER)
    requests = [SampleRequest(prompt, (0,)) for prompt in random_tokens(9, 9, 9, 9)]
    monkeypatch.setattr(batched_decoding, "check_batching", lambda model: Batching(True, RowBytes(1, 79)))
    for free, rows in ((300, 3), (299, 2)):
        monkeypatch.setattr(hf, "free_bytes", lambda device, free=free: free / hf.MEMORY_SHARE + 0.01)
        with forwards(source.model) as shapes:
            sampled(source, requests)
        assert max(shape[0] for shape in shapes) == rows


def test_a_batch_size_takes_no_memory_into_account() -> None:
    source = Source(tiny_model("qwen3_5"), NEVER)
    requests = [SampleRequest(prompt, (0,)) for prompt in random_tokens(9, 9, 9, 9)]
    generator = HFGenerator(max_new_tokens=3, temperature=1.0, batch_size=4)
    generator.load(source)
    with forwards(source.model) as shapes:
        answer(generator, requests)
    assert shapes[0] == (4, 9)


# ------------------------------------------------------- what all prompts begin with

SHARED = tuple(range(20, 40))
LATER = [SHARED + tail for tail in ((5,), (6, 7, 8, 9, 10, 11), (5, 4, 3), (6, 7))]


def answers_and_tokens_read(kind: str, *, shares: bool) -> tuple[list[list[tuple[int, ...]]], int]:
    """Greedy and sampled answers, and how many tokens the model read for the prompts."""
    model = tiny_model(kind)
    generator = HFGenerator(max_new_tokens=5, temperature=1.0)
    generator.load(Source(model, NEVER))
    assert generator._batching is not None
    generator._batching = generator._batching._replace(shares_prefix=shares)
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    requests = [SampleRequest(LATER[0], (1, 2)), *(SampleRequest(prompt, ()) for prompt in LATER[1:])]
    found = {answer.request: answer for answer in generator.generate(requests)}
    hook.remove()
    decoded = [count for count in read if count <= 5]
    return [[r.token_ids for r in found[n].responses] for n in range(len(requests))], sum(read) - sum(decoded)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "cohere", "gpt2", "opt", "granite"])
def test_what_prompts_begin_with_is_read_once(kind: str) -> None:
    """Twenty tokens, and the rest of each padded to six: 20 + 4 * 6 instead of 4 * 26."""
    shared, read = answers_and_tokens_read(kind, shares=True)
    plain, read_plain = answers_and_tokens_read(kind, shares=False)
    assert shared == plain
    assert (read, read_plain) == (20 + 4 * 6, 4 * 26)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("llama", True), ("qwen2", True), ("gemma3", False), ("mamba2", False), ("qwen3_5", False)],
)
def test_only_full_attention_shares_a_beginning(kind: str, shares: bool) -> None:
    assert check_batching(tiny_model(kind)).shares_prefix is shares


def test_keys_at_wrong_places_are_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ReservedLayer, "move", lambda self, source: None)
    with caplog.at_level("INFO"):
        assert not check_batching(tiny_model("llama")).shares_prefix
    assert "Each prompt is read whole: what they share would give other log-probs" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2, 3), (1, 2, 3)], 2),  # each keeps a token of its own
        ([(1, 2, 3, 4), (1, 2)], 1),
        ([(2, 1), (1, 1)], 0),
        ([(3,), (3,)], 0),
    ],
)
def test_common_prefix(prompts: list[tuple[int, ...]], shared: int) -> None:
    assert common_prefix(prompts) == shared
