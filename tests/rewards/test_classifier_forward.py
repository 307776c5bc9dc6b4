"""Batches of a reward model, and prompts that are read once for all their responses."""

from __future__ import annotations

import functools
import gc
import logging
import random
import re
import warnings
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import byte_tokenizer, tiny_config
from support.rewards import questions
from support.tiny import CONFIGS, random_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from sppo_lightning.rewards import SequenceClassificationReward
from sppo_lightning.rewards.classifier_forward import ClassifierForward, common_beginnings
from sppo_lightning.types import UserError

CPU = torch.device("cpu")
PAD = 2
MANY = 100_000
Ids = tuple[int, ...]


@functools.cache
def classifier(kind: str = "llama", dtype: torch.dtype = torch.float32, pad: int | None = PAD) -> Any:
    """A random one-logit model in eval mode; shared, so leave it as it is."""
    fields = CONFIGS[kind].to_dict()
    config = type(CONFIGS[kind]).from_dict({**fields, "num_labels": 1, "pad_token_id": pad})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval().requires_grad_(False).to(dtype)


def conversations() -> tuple[list[Ids], list[str]]:
    """Prompts of 9 to 40 tokens with one to five responses each; sliding windows are of 6 tokens."""
    ids, owners = [], []
    for number, length in enumerate([20, 9, 33, 40, 12]):
        prompt = random_tokens(length, seed=number)[0]
        responses = random_tokens(*[7, 1, 16, 3, 11][: number + 1], seed=100 + number)
        ids += [prompt + response for response in responses]
        owners += [f"p{number}"] * (number + 1)
    return ids, owners


def alone(model: Any, ids: Sequence[Ids]) -> list[float]:
    """Each conversation by itself: nothing padded, nothing shared; rounded as scores are."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0, 0].float().item() for row in ids]


def scored(
    model: Any, ids: Sequence[Ids], owners: Sequence[Hashable], batch_tokens: int | None = MANY
) -> list[float]:
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    return ClassifierForward(model, batch_tokens).scores(encoded, owners)


class Pass(NamedTuple):
    """What one forward of the model was given."""

    rows: int
    tokens: int  # a row, new ones
    width: int  # a row, with those that the cache holds
    cached: bool


@contextmanager
def passes(model: nn.Module, most: int | None = None, calls: int = 1000) -> Iterator[list[Pass]]:
    """Record every forward pass; one that holds more than ``most`` tokens finds the memory full."""
    seen: list[Pass] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, width = kwargs["attention_mask"].shape
        cached = kwargs.get("past_key_values") is not None
        seen.append(Pass(rows, kwargs["input_ids"].shape[1], width, cached))
        assert len(seen) < calls, "goes on for ever"
        if most is not None and rows * width > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# -------------------------------------------------------- shared against one by one


EXACT = [
    kind for kind in CONFIGS if kind != "gemma2"
]  # its attention rounds to float32, whatever the weights
CASES = [(kind, torch.float32, 1e-5) for kind in CONFIGS] + [(kind, torch.float64, 1e-10) for kind in EXACT]


@pytest.mark.parametrize("batch_tokens", [1, 50, MANY])
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), CASES)
def test_sharing_a_prompt_changes_no_score(
    kind: str, dtype: torch.dtype, tolerance: float, batch_tokens: int
) -> None:
    """Two float64 scores that agree are the same number once they are float32."""
    model = classifier(kind, dtype)
    ids, owners = conversations()
    expected = alone(model, ids)
    assert max(expected) - min(expected) > 1
    with passes(model) as seen:
        found = scored(model, ids, owners, batch_tokens)
    assert any(one.cached and one.tokens > 1 for one in seen)
    assert found == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_is_read_once_for_all_its_responses(kind: str) -> None:
    """After the check: alone, the first prompt; then the four others, and their responses behind them."""
    model = classifier(kind)
    ids, owners = conversations()
    forward = ClassifierForward(model, MANY)
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    forward.scores(encoded, owners)
    with passes(model) as seen:
        forward.scores(encoded, owners)
    assert seen == [Pass(1, 27, 27, False), Pass(4, 40, 40, True), Pass(14, 16, 56, True)]


def test_one_response_a_prompt_needs_no_check() -> None:
    model = classifier()
    ids = random_tokens(20, 5, 11)
    with passes(model) as seen:
        found = scored(model, ids, "abc")
    assert seen == [Pass(3, 20, 20, False)]
    assert found == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


def test_owners_that_come_back_are_others() -> None:
    """Neighbours share; what stands apart does not, though it be the same prompt."""
    model = classifier()
    (prompt,) = random_tokens(20)
    ids = [prompt + response for response in random_tokens(3, 4, 5, 6, seed=1)]
    assert scored(model, ids, "aaba") == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


def test_the_same_owner_may_begin_otherwise() -> None:
    """As with a chat template that counts the words of the answer first."""
    model = classifier()
    ids = random_tokens(20, 25, 30)
    assert scored(model, ids, "aaa") == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


def test_nothing_to_score() -> None:
    assert scored(classifier(), [], []) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12), st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 20, 60, MANY]),
)
def test_whatever_the_conversations(groups: list[tuple[int, list[list[int]]]], batch_tokens: int) -> None:
    """Few token ids, padding among them: responses begin alike, repeat each other, or are padding only."""
    model = classifier()
    ids, owners = [], []
    for number, (length, responses) in enumerate(groups):
        prompt = (*random.Random(number).choices(range(5), k=length), 3)
        ids += [(*prompt, *response) for response in responses]
        owners += [number] * len(responses)
    found = scored(model, ids, owners, batch_tokens)
    assert found == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


# --------------------------------------------------------------- padding and ends


PROMPT = random_tokens(15, seed=3)[0]
A, B, C = 50, 60, 70


@pytest.mark.parametrize(
    "responses",
    [
        [(), (A,), (A, B)],
        [(A, B), (A, B, C), (A,)],
        [(A, B, C), (A, B, C)],
        [(), ()],
        [(PAD,), (A, PAD, PAD), (A, PAD, B)],
        [(PAD, PAD, PAD), (PAD, PAD)],
        [(A, PAD), (A,), (A, PAD, PAD, PAD)],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_score_is_read_where_the_model_reads_it(kind: str, responses: list[Ids]) -> None:
    """At the last token that is not padding, which may stand in the prompt."""
    model = classifier(kind)
    ids = [PROMPT + response for response in responses]
    with passes(model) as seen:
        found = scored(model, ids, [0] * len(ids))
    assert seen[-1].cached
    assert found == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


def test_conversations_of_padding_alone() -> None:
    model = classifier()
    ids = [(PAD,) * 12, (PAD,) * 12 + (A,), (PAD,) * 9]
    assert scored(model, ids, "aaa") == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


def test_a_model_without_a_padding_token_reads_the_last_token() -> None:
    """Also a token that padded the call before."""
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=None)).eval()
    model.load_state_dict(classifier().state_dict())
    forward = ClassifierForward(model, MANY)
    for last in [(0, 1, 3), (4, 1, 2), (2, 5, 0)]:
        ids = [(*PROMPT[:length], 0, 1, 2, 3, end) for length, end in zip((15, 12, 15), last, strict=True)]
        with torch.no_grad():
            hidden = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
            expected = [model.score(one).item() for one in hidden]
        for owners in ("abc", "aab", "aaa"):
            encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
            assert forward.scores(encoded, owners) == pytest.approx(expected, rel=0, abs=1e-5)


def test_common_beginnings_by_hand() -> None:
    """Of a, 9 tokens are common, one less where its shortest ends; of b, 7, which are read again; c is alone.

    Of d, the last token that is no padding of a row that is a prefix of the other.
    """
    head = tuple(range(10, 19))
    ids = [
        *((*head, 1), (*head, 3, 4), (*head, 3, 5)),
        *((*head[:7], 1, 1), (*head[:7], 3, 3)),
        (*head, 7),
        *((*head, PAD, PAD), (*head, PAD, 5)),
    ]
    groups = common_beginnings(ids, "aaabbcdd", PAD)
    assert [(group.rows, group.shared) for group in groups] == [
        ((0, 1, 2), 9),
        ((3,), 0),
        ((4,), 0),
        ((5,), 0),
        ((6, 7), 8),
    ]
    assert common_beginnings([], [], PAD) == []


# ------------------------------------------------------- models that cannot share


def test_an_encoder_reads_whole_conversations(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**fields, intermediate_size=64, pad_token_id=PAD, num_labels=1, initializer_range=0.3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids, owners = conversations()
    kinds = [[0] * 5 + [1] * (len(row) - 5) for row in ids]
    encoded = [
        {"input_ids": list(row), "token_type_ids": kind, "attention_mask": [1] * len(row)}
        for row, kind in zip(ids, kinds, strict=True)
    ]
    with caplog.at_level(logging.INFO), passes(model) as seen:
        found = ClassifierForward(model, 200).scores(encoded, owners)
    assert sum(one.rows for one in seen) == len(ids)
    assert all(one.tokens == one.width and not one.cached for one in seen)
    with torch.no_grad():
        expected = [
            model(**{name: torch.tensor([values]) for name, values in row.items()}).logits.item()
            for row in encoded
        ]
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    assert caplog.messages == [
        "BertForSequenceClassification keeps no keys and values: each response is scored with its prompt"
    ]


class Bidirectional(LlamaForSequenceClassification):
    """A decoder's layers with an encoder's attention: all that is there sees all that is there."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, **rest: Any
    ) -> Any:
        new = input_ids.shape[1]
        seen = attention_mask[:, None, None, :].bool().expand(-1, 1, new, -1)
        return super().forward(input_ids, seen, past_key_values=past_key_values, **rest)


class Stubborn(LlamaForSequenceClassification):
    """Takes a cache of its own only, as some recurrent models do."""

    def forward(self, *args: Any, past_key_values: Any = None, **rest: Any) -> Any:
        if past_key_values is not None:
            raise ValueError("a cache of mine, please")
        return super().forward(*args, **rest)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bidirectional, r"Bidirectional scores a prompt that is read once differently (by "),
        (Stubborn, r"Stubborn cannot read a prompt once (a cache of mine, please)"),
    ],
)
def test_a_decoder_that_cannot_share_is_found_out_once(
    kind: type[LlamaForSequenceClassification], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = kind(tiny_config(num_labels=1)).eval()
    model.load_state_dict(classifier().state_dict())
    ids, owners = conversations()
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    forward = ClassifierForward(model, MANY)
    with caplog.at_level(logging.INFO):
        first = forward.scores(encoded, owners)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits.item()
            for row in ids
        ]
    assert first == pytest.approx(expected, rel=0, abs=1e-5)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(message)
    with passes(model) as seen:
        forward.scores(encoded, owners)
    assert [(one.rows, one.tokens, one.cached) for one in seen] == [(len(ids), 56, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leak_is_told_from_rounding(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Rounding moves a score by 0.001 at most; an attention that sees what comes after moves it by 0.1."""
    for kind in CONFIGS:
        model = classifier(kind, dtype)
        with passes(model) as seen:
            scored(model, *conversations())
        assert seen[-1].cached, kind
    leaking: Any = Bidirectional(tiny_config(num_labels=1)).eval()
    leaking.load_state_dict(classifier().state_dict())
    with caplog.at_level(logging.INFO), passes(leaking.to(dtype)) as seen:
        scored(leaking, *conversations())
    assert not seen[-1].cached
    assert re.search(r"Bidirectional scores .* \(by 0\.1\d, tolerance 0\.0", caplog.text)


def test_another_error_of_the_model_passes() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    handle = classifier().register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
            scored(classifier(), random_tokens(5, 6), "ab")
    finally:
        handle.remove()


# --------------------------------------------------------------- budget and memory


def budget_kept(seen: Sequence[Pass], batch_tokens: int) -> bool:
    return all(one.rows == 1 or one.rows * one.width <= batch_tokens for one in seen)


@pytest.mark.parametrize("batch_tokens", [1, 30, 77, 150, 400])
def test_no_batch_of_whole_conversations_is_over_the_budget(batch_tokens: int) -> None:
    model = classifier()
    ids = random_tokens(*random.Random(0).choices(range(1, 40), k=25))
    with passes(model) as seen:
        scored(model, ids, range(len(ids)), batch_tokens)
    assert budget_kept(seen, batch_tokens)
    assert len(seen) == 25 if batch_tokens == 1 else len(seen) < 25


def test_a_prompts_responses_of_different_lengths_are_within_the_budget() -> None:
    """The first response is as long as the budget: the others, cut off its group, are another batch."""
    model = classifier()
    ids = [PROMPT + response for response in random_tokens(85, 2, 2, 2)]
    forward = ClassifierForward(model, 100)
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    forward.scores(encoded[1:], "aaa")  # the check
    with passes(model) as seen:
        forward.scores(encoded, "aaaa")
    assert budget_kept(seen, 100)


def test_the_padding_of_prompts_and_responses_counts() -> None:
    """40 tokens each: a long prompt with short responses beside a short one with long responses makes 68 of them."""
    model = classifier()
    first, second = random_tokens(36, 8)
    ids = [first + one for one in random_tokens(4, 4, seed=1)]
    ids += [second + one for one in random_tokens(32, 32, seed=2)]
    forward = ClassifierForward(model, 160)
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    forward.scores(encoded[:2], "aa")
    with passes(model) as seen:
        forward.scores(encoded, "aabb")
    assert budget_kept(seen, 160)


def test_without_a_setting_the_budget_is_what_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 hidden states of 32 floats are 3,072 bytes a token, of 40 % of what is free; at most 8,192 on a CPU."""
    model = classifier()
    ids = random_tokens(*[20] * 12)
    for free, rows in ((3072 * 100, 2), (3072 * 250, 5), (1, 1), (2**60, 12)):
        monkeypatch.setattr("sppo_lightning.rewards.classifier_forward.free_bytes", lambda _, free=free: free)
        with passes(model) as seen:
            scored(model, ids, range(12), None)
        assert max(one.rows for one in seen) == rows
    many = random_tokens(*[20] * 450)
    with passes(model) as seen:
        scored(model, many, range(450), None)
    assert max(one.rows for one in seen) == 8192 // 20


FULL = r"^\d+ conversations of up to \d+ tokens did not fit into memory at once: halving the batch$"


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("most", [80, 150, 400])
def test_a_full_memory_halves_the_batch_and_is_remembered(most: int, share: bool) -> None:
    model = classifier()
    ids, owners = conversations()
    callers: Sequence[Hashable] = owners if share else range(len(ids))
    expected = scored(model, ids, callers)
    forward = ClassifierForward(model, MANY)
    encoded = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]
    with passes(model, most) as seen:
        with pytest.warns(UserWarning, match=FULL):
            found = forward.scores(encoded, callers)
        assert found == pytest.approx(expected, rel=0, abs=1e-5)
        assert any(one.cached for one in seen) == share
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert forward.scores(encoded, callers) == pytest.approx(expected, rel=0, abs=1e-5)


def test_a_full_memory_is_told_with_numbers() -> None:
    """Twelve conversations of 30 tokens are 360; 180 are six, 90 are three."""
    model = classifier()
    ids = random_tokens(*[30] * 12)
    with passes(model, 100) as seen, pytest.warns(UserWarning, match=FULL) as told:
        scored(model, ids, range(12))
    assert [str(one.message) for one in told] == [
        f"{rows} conversations of up to 30 tokens did not fit into memory at once: halving the batch"
        for rows in (12, 6)
    ]
    assert [one.rows for one in seen] == [12, 6, 3, 3, 3, 3]


def test_what_did_not_fit_is_read_before_what_is_longer() -> None:
    """Twelve conversations of 10 tokens are 120, then six of them 60; then two of 30."""
    model = classifier()
    ids = random_tokens(*[10] * 12, *[30] * 4)
    with passes(model, 100) as seen, pytest.warns(UserWarning, match=FULL):
        scored(model, ids, range(16), 120)
    assert [(one.rows, one.width) for one in seen] == [(12, 10), (6, 10), (6, 10), (2, 30), (2, 30)]


def test_a_long_response_among_short_ones_does_not_halve_for_ever() -> None:
    """What was cut off a group must not be put beside it again."""
    model = classifier()
    ids = [PROMPT + response for response in random_tokens(85, 2, 2, 2)]
    with passes(model, 250, calls=40), pytest.warns(UserWarning, match=FULL):
        found = scored(model, ids, "aaaa", 400)
    assert found == pytest.approx(alone(model, ids), rel=0, abs=1e-5)


ALONE = (
    r"^one conversation of 30 tokens does not fit into the memory of cpu next to the reward model: set its "
    r"max_tokens, or quantization: nf4$"
)


@pytest.mark.filterwarnings("ignore:.*did not fit into memory")
def test_a_single_conversation_that_does_not_fit() -> None:
    model = classifier()
    with passes(model, 29, calls=20), pytest.raises(UserError, match=ALONE):
        scored(model, random_tokens(30, 25), "ab")


@pytest.mark.filterwarnings("ignore:.*did not fit into memory")
def test_a_single_conversation_that_does_not_fit_where_prompts_could_be_shared() -> None:
    """Not even the check fits."""
    model = classifier()
    ids = [PROMPT + response for response in random_tokens(15, 15)]
    with passes(model, 10, calls=20), pytest.raises(UserError, match=ALONE):
        scored(model, ids, "aa")


# ------------------------------------------------------------------- quantisation


def loaded(folder: Path, **settings: Any) -> SequenceClassificationReward:
    reward = SequenceClassificationReward(str(folder), **settings)
    reward.check()
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def wide_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of quantisation are 64 weights long."""
    folder = tmp_path_factory.mktemp("reward-64")
    torch.manual_seed(1)
    config = tiny_config(num_labels=1, hidden_size=64, intermediate_size=128)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def head_is_whole(reward: SequenceClassificationReward, folder: Path) -> bool:
    head: Any = cast(Any, reward._model).score
    return type(head) is nn.Linear and torch.equal(head.weight, cast(Any, loaded(folder)._model).score.weight)


def test_a_model_that_is_read_again_leaves_the_memory(tiny_reward_model: Path) -> None:
    reward = loaded(tiny_reward_model, between_phases="free")
    prompts, responses = questions()
    expected = reward.score(prompts, responses).rewards
    model = weakref.ref(cast(Any, reward._model))
    reward.unload()
    gc.collect()
    assert model() is None
    reward.load(CPU)
    assert reward.score(prompts, responses).rewards == expected


@pytest.mark.parametrize("place", ["host", "free"])
def test_a_reward_model_in_four_bits(wide_reward_model: Path, place: Literal["host", "free"]) -> None:
    """Sharing changes its scores by less than 1e-5, the weights' rounding by more than 0.1."""
    prompts, responses = questions()
    whole = loaded(wide_reward_model).score(prompts, responses).rewards
    reward = loaded(wide_reward_model, quantization="nf4", between_phases=place)
    model: Any = reward._model
    assert head_is_whole(reward, wide_reward_model)
    assert {type(layer.mlp.up_proj) for layer in model.model.layers} == {Linear4bit}
    with passes(model) as seen:
        shared = reward.score(prompts, responses).rewards
    assert seen[-1].cached
    apart = [reward.score([one], [text]).rewards[0] for one, text in zip(prompts, responses, strict=True)]
    assert shared == pytest.approx(apart, rel=0, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(shared, whole, strict=True)) > 0.1
    reward.unload()
    assert (reward._model is model) == (place == "host")
    reward.load(CPU)
    assert reward.score(prompts, responses).rewards == pytest.approx(shared, rel=0, abs=1e-5)


@pytest.mark.parametrize("place", ["host", "free"])
def test_a_reward_model_in_eight_bits(wide_reward_model: Path, place: Literal["host", "free"]) -> None:
    """Its rounding depends on what else is in the batch, so that the check finds sharing unlike."""
    prompts, responses = questions()
    whole = loaded(wide_reward_model).score(prompts, responses).rewards
    reward = loaded(wide_reward_model, quantization="int8", between_phases=place)
    assert head_is_whole(reward, wide_reward_model)
    found = reward.score(prompts, responses).rewards
    assert found == pytest.approx(whole, rel=0, abs=0.5)
    assert found != pytest.approx(whole, rel=0, abs=1e-3)
    reward.unload()
    reward.load(CPU)
    assert reward.score(prompts, responses).rewards == pytest.approx(found, rel=0, abs=1e-5)
