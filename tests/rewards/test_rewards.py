"""Reward models and functions."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchmetrics
import torchmetrics.text
from support.models import byte_tokenizer, tiny_config
from tokenizers import processors
from torch import Tensor
from torchmetrics import Metric
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sppo_lightning.rewards import FunctionReward, Reward, SequenceClassificationReward, TorchmetricsReward
from sppo_lightning.rewards.protocol import Scores, checked_scores
from sppo_lightning.types import Message, Prompt, UserError

CPU = torch.device("cpu")


def prompt_of(text: str = "hi", answer: str | None = None, **metadata: Any) -> Prompt:
    return Prompt(f"id of {text}", text, (Message(role="user", content=text),), answer, metadata)


PROMPTS = [
    prompt_of("hi"),
    prompt_of("what is the way to the river, please?"),
    prompt_of("x"),
    prompt_of("why?"),
]
RESPONSES = ["yes", "no", "follow the stone road, then ask again!", ""]


# --------------------------------------------------------------------- metrics


def score_one(metric: Metric, response: str, answer: str, **settings: Any) -> float:
    reward = TorchmetricsReward(metric, **settings)
    reward.check()
    (score,) = reward.score([prompt_of(answer=answer)], [response])
    return score


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Paris", 1.0),
        ("  the PARIS. ", 1.0),
        ("", 0.0),
        ("London", 0.0),
        ("It is in Paris, France!", 2 / 6),
        ("The answer is Paris.", 0.5),
    ],
)
def test_squad_f1(response: str, expected: float) -> None:
    """Without case, punctuation and articles, precision over the words said, recall 1 where 'paris' is among them.

    "it is in paris france": precision 1/5, F1 = 2 (1/5) / (6/5) = 1/3. "answer is paris": 2 (1/3) / (4/3) = 1/2.
    """
    found = score_one(torchmetrics.text.SQuAD(), response, "Paris", output="f1", scale=0.01)
    assert found == pytest.approx(expected, abs=1e-6)


ROUGE = {"rouge_keys": ("rouge1", "rougeL")}
METRICS: list[tuple[Callable[[], Metric], str | None]] = [
    (torchmetrics.text.SQuAD, "f1"),
    (torchmetrics.text.SQuAD, "exact_match"),
    (lambda: torchmetrics.text.BLEUScore(n_gram=1), None),
    (lambda: torchmetrics.text.SacreBLEUScore(n_gram=1), None),
    (torchmetrics.text.CHRFScore, None),
    (lambda: torchmetrics.text.ROUGEScore(**ROUGE), "rougeL_fmeasure"),
    (torchmetrics.text.CharErrorRate, None),
    (torchmetrics.text.WordErrorRate, None),
    (torchmetrics.text.MatchErrorRate, None),
    (torchmetrics.text.EditDistance, None),
    (torchmetrics.text.ExtendedEditDistance, None),
    (torchmetrics.text.TranslationEditRate, None),
    (torchmetrics.text.WordInfoLost, None),
    (torchmetrics.text.WordInfoPreserved, None),
]


@pytest.mark.parametrize(
    ("metric", "output"), METRICS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_better_answer_scores_higher_under_every_metric(
    metric: Callable[[], Metric], output: str | None
) -> None:
    """An empty answer is never better than a wrong one; where the metric is not defined on it, it is NaN."""
    right, wrong, empty = (
        score_one(metric(), response, "the river bends", output=output)
        for response in ("the river bends", "clouds gather above", "")
    )
    assert right > wrong
    assert not empty > wrong


@pytest.mark.parametrize(
    ("metric", "output", "response", "answer", "expected"),
    [
        # one of three characters is wrong; two words of three are there
        (torchmetrics.text.CharErrorRate(), None, "abd", "abc", -1 / 3),
        (torchmetrics.text.WordErrorRate(), None, "a b", "a b c", -1 / 3),
        (torchmetrics.text.TranslationEditRate(), None, "a b", "a b c", -1 / 3),
        (torchmetrics.text.TranslationEditRate(), None, "", "a b c", -1.0),
        (torchmetrics.text.TranslationEditRate(no_punctuation=True), None, "?!", "a b c", -1.0),
        (torchmetrics.text.TranslationEditRate(), None, "", "", 0.0),
        # hits over words said, times hits over words wanted
        (torchmetrics.text.WordInfoPreserved(), None, "a c", "a b", 1 / 4),
        (torchmetrics.text.WordInfoLost(), None, "a c", "a b", -3 / 4),
        # precision 1, brevity penalty exp(1 - 3/2)
        (torchmetrics.text.BLEUScore(n_gram=1), None, "the cat", "the cat sat", math.exp(-0.5)),
        # two of three letters, both ways
        (torchmetrics.text.CHRFScore(n_char_order=1, n_word_order=0, beta=1.0), None, "abc", "abd", 2 / 3),
        # precision 1, recall 2/3
        (torchmetrics.text.ROUGEScore(**ROUGE), "rouge1_fmeasure", "the cat", "the cat sat", 0.8),
    ],
)
def test_metrics_golden(
    metric: Metric, output: str | None, response: str, answer: str, expected: float
) -> None:
    assert score_one(metric, response, answer, output=output) == pytest.approx(expected, abs=1e-6)


def test_each_response_is_measured_on_its_own() -> None:
    reward = TorchmetricsReward(torchmetrics.text.CharErrorRate(), scale=10.0)
    prompts = [prompt_of(answer="abcd"), prompt_of(answer="ab"), prompt_of(answer="abcd")]
    assert reward.score(prompts, ["abcd", "xb", "xxxx"]) == [0.0, -5.0, -10.0]
    assert reward.score(prompts[1:2], ["ab"]) == [0.0]


def test_metric_outputs() -> None:
    message = r"^TorchmetricsReward\.output=None: SQuAD gives exact_match, f1: choose one$"
    with pytest.raises(UserError, match=message):
        TorchmetricsReward(torchmetrics.text.SQuAD()).check()
    with pytest.raises(
        UserError, match=r"^TorchmetricsReward\.output='f1': BLEUScore gives one number: leave it"
    ):
        TorchmetricsReward(torchmetrics.text.BLEUScore(), output="f1").check()
    with pytest.raises(
        UserError, match=r"^data\.reward\.metric: MeanSquaredError does not compare two texts"
    ):
        TorchmetricsReward(torchmetrics.MeanSquaredError()).check()


def test_prompts_without_an_answer() -> None:
    reward = TorchmetricsReward(torchmetrics.text.CharErrorRate())
    reward.check_prompts([prompt_of(answer="a")])
    message = r"^2 of 3 prompts have no 'answer' \(first: 'id of b'\), which TorchmetricsReward compares with"
    with pytest.raises(UserError, match=message):
        reward.check_prompts([prompt_of("a", answer="a"), prompt_of("b"), prompt_of("c")])


# ------------------------------------------------------------------- functions


def test_function_reward_gets_texts_and_metadata() -> None:
    seen: list[Any] = []

    def function(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.append((prompts, responses, metadata))
        return [0.5, 1.5]

    prompts = [prompt_of("a", answer="1", level=3), prompt_of("b", source="web")]
    assert FunctionReward(function).score(prompts, ("x", "y")) == [0.5, 1.5]
    ((texts, responses, metadata),) = seen
    assert (texts, responses) == (["a", "b"], ["x", "y"])
    assert metadata == [
        {"level": 3, "id": "id of a", "messages": [{"role": "user", "content": "a"}], "answer": "1"},
        {"source": "web", "id": "id of b", "messages": [{"role": "user", "content": "b"}]},
    ]
    assert prompts[0].metadata == {"level": 3}  # what the function does to its own dict stays there


def scores_of(result: Any) -> list[float]:
    def function(*_: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    return checked_scores(FunctionReward(function), [prompt_of(), prompt_of()], ["a", "b"])


@pytest.mark.parametrize(
    "result", [[1, 2.0], (1.0, 2), torch.tensor([1.0, 2.0]), [True, torch.tensor(2)], iter([1, 2])]
)
def test_whatever_holds_numbers_is_a_list_of_scores(result: Any) -> None:
    assert scores_of(result).rewards == [1.0, 2.0]


@pytest.mark.parametrize("lost", [float("nan"), float("-inf"), None])
def test_a_response_without_a_finite_score_has_a_reason(lost: float | None) -> None:
    found = scores_of([1.0, lost])
    assert found.rewards[0] == 1.0
    assert not math.isfinite(found.rewards[1])
    assert found.reasons == {1: "non_finite_reward"}
    assert found.error is None


def failing_at(*broken: str, comparative: bool = False) -> tuple[Reward, list[list[str]]]:
    """A reward that raises where it meets a response of ``broken``, and what it was asked."""
    asked: list[list[str]] = []

    class Failing(Reward):
        @property
        def comparative(self) -> bool:
            return comparative

        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
            asked.append(list(responses))
            if set(responses) & set(broken):
                raise KeyError("level")
            return Scores(
                [float(len(response)) for response in responses],
                reasons={row: "rude" for row, response in enumerate(responses) if response == "damn"},
                parts={"first": [float(ord(response[0])) for response in responses]},
            )

    return Failing(), asked


def test_a_response_that_cannot_be_scored_is_dropped_alone() -> None:
    """Prompts are told apart first, then the responses of the one that fails."""
    reward, asked = failing_at("bb")
    prompts = [prompt_of(text) for text in "xxxyyz"]
    found = checked_scores(reward, prompts, ["a", "bb", "ccc", "damn", "eeeee", "f"])
    assert found.rewards[0] == 1
    assert math.isnan(found.rewards[1])
    assert found.rewards[2:] == [3, 4, 5, 1]
    assert found.reasons == {1: "failed_score", 3: "rude"}
    assert [math.isnan(value) for value in found.parts["first"]] == [False, True] + [False] * 4
    assert found.parts["first"][5] == ord("f")
    assert found.error is not None
    message = r"^data\.reward Failing raised KeyError: 'level' \(.*test_rewards\.py:\d+, in score\)$"
    assert re.match(message, found.error)
    assert ["damn", "eeeee"] in [part[:2] for part in asked]


def test_a_comparative_reward_gets_all_responses_of_a_prompt_or_none() -> None:
    reward, asked = failing_at("bb", comparative=True)
    prompts = [prompt_of(text) for text in "xxxyy"]
    found = checked_scores(reward, prompts, ["a", "bb", "ccc", "d", "e"])
    assert found.reasons == dict.fromkeys(range(3), "failed_score")
    assert found.rewards[3:] == [1, 1]
    assert asked == [["a", "bb", "ccc", "d", "e"], ["a", "bb", "ccc"], ["d", "e"]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"returned 1 rewards for 2 responses: it must return one for each$"),
        ([1.0, 2.0, 3.0], r"returned 3 rewards for 2 responses: it must return one for each$"),
        (1.0, r"returned a float: it must return a list of numbers$"),
        (None, r"returned a NoneType: it must return a list of numbers$"),
        ([1.0, "2"], r"returned '2', which is no number: it must return one number a response$"),
        ([1.0, [2.0, 3.0]], r"returned \[2\.0, 3\.0\], which is no number"),
        # without an order, or with numbers that are none of the function's
        ({0: 0.5, 1: 0.7}, r"returned a dict: it must return a list of numbers$"),
        ({0.5, 0.7}, r"returned a set: it must return a list of numbers$"),
        (b"ab", r"returned a bytes: it must return a list of numbers$"),
        ("12", r"returned a str: it must return a list of numbers$"),
        (torch.tensor(1.0), r"returned a Tensor: it must return a list of numbers$"),
        (itertools.repeat(1.0), r"returned 3 or more rewards for 2 responses: it must return one for each$"),
        (iter([1.0]), r"returned 1 rewards for 2 responses: it must return one for each$"),
    ],
)
def test_rewards_that_break_their_contract(result: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^data\\.reward FunctionReward {message}"):
        scores_of(result)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Scores([1.0, 2.0], {2: "late"}),
            "gave 'late' as the reason to drop response 2 of 2: it must be a text",
        ),
        (Scores([1.0, 2.0], {0: ""}), "gave '' as the reason to drop response 0 of 2: it must be a text"),
        (
            Scores([1.0, 2.0], cast(Any, {0: None})),
            "gave None as the reason to drop response 0 of 2: it must be",
        ),
        (Scores([1.0, 2.0], cast(Any, [0])), "gave reasons as a list: give a mapping$"),
        (Scores([1.0, 2.0], {}, cast(Any, [0])), "gave parts as a list: give a mapping$"),
        (Scores([1.0, 2.0], {}, cast(Any, {5: [1.0, 2.0]})), "called a part 5: a name is a text$"),
        (Scores([1.0, 2.0], {}, {"a": [1.0]}), "part 'a' returned 1 rewards for 2 responses"),
    ],
)
def test_scores_that_break_their_contract(found: Scores, message: str) -> None:
    """They would end the run with a traceback when a shard is written."""

    class Own(Reward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
            return found

    with pytest.raises(UserError, match=f"^data\\.reward Own {message}"):
        checked_scores(Own(), PROMPTS[:2], RESPONSES[:2])


@pytest.mark.parametrize("result", [lambda: iter([1.0, 1 / 0]), lambda: (1 / 0 for _ in range(2))])
def test_a_reward_that_fails_while_its_numbers_are_read(result: Callable[[], Any]) -> None:
    def function(prompts: list[str], responses: list[str], metadata: list[Any]) -> Any:
        return result()

    found = checked_scores(FunctionReward(function), PROMPTS[:2], RESPONSES[:2])
    assert found.reasons == {0: "failed_score", 1: "failed_score"}
    assert "ZeroDivisionError" in str(found.error)


def test_a_reward_that_ends_the_process_fails_instead() -> None:
    """Some libraries do when a model is missing; with status 0 the run would look finished."""

    def function(prompts: list[str], responses: list[str], metadata: list[Any]) -> list[float]:
        sys.exit(0)

    found = checked_scores(FunctionReward(function), PROMPTS[:2], RESPONSES[:2])
    assert found.reasons == {0: "failed_score", 1: "failed_score"}
    assert "raised SystemExit: 0" in str(found.error)


@pytest.mark.parametrize("conversational", [False, True])
def test_what_a_function_changes_belongs_to_no_prompt(conversational: bool) -> None:
    """The next reward, or the next call, would be asked about something else."""
    prompts = [prompt_of("hi", tags=["a"]), prompt_of("why?", tags=["b"])]
    before = copy.deepcopy(prompts)
    responses = ["yes", "no"]

    def function(prompts: list[Any], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        for fields in metadata:
            fields["messages"][0]["content"] = fields["tags"][0] = "changed"
            fields["id"] = "changed"
        prompts.clear()
        responses.clear()
        return [1.0, 2.0]

    def of_trl(prompts: list[Any], completions: list[Any], tags: list[Any]) -> list[float]:
        prompts[0][0]["content"] = tags[0][0] = "changed"
        completions.clear()
        return [1.0, 2.0]

    reward = FunctionReward(of_trl, conversational=True) if conversational else FunctionReward(function)
    assert checked_scores(reward, prompts, responses).rewards == [1.0, 2.0]
    assert prompts == before
    assert responses == ["yes", "no"]


def test_a_users_error_passes_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^say it again$"):
        scores_of(UserError("say it again"))


def test_a_reward_needs_a_score_and_nothing_else() -> None:
    class Length(Reward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            return [float(len(response)) for response in responses]

    reward = Length()
    reward.check()
    reward.check_prompts(PROMPTS)
    reward.load(CPU)
    assert checked_scores(reward, PROMPTS, RESPONSES) == ([3, 2, 38, 0], {}, {}, None)
    assert not reward.comparative
    reward.unload()


# --------------------------------------------------------------- reward models


def scored(
    folder: Path, prompts: Sequence[Prompt] = PROMPTS, responses: Sequence[str] = RESPONSES, **settings: Any
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Return the scores, and what the model was given."""
    reward = SequenceClassificationReward(str(folder), **settings)
    reward.check()
    reward.load(CPU)
    model: Any = reward._model
    inputs: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    return list(reward.score(prompts, responses).rewards), inputs


def chat_ids(prompt: Prompt, response: str) -> list[int]:
    """The conversation as the template of the tests writes it, by hand."""
    text = "".join(f"<{turn['role']}>{turn['content']}" for turn in prompt.messages)
    ids: list[int] = byte_tokenizer()(f"{text}<assistant>{response}")["input_ids"]
    return [0, *ids, 1]


@torch.no_grad()
def last_token_scores(
    folder: Path, prompts: Sequence[Prompt] = PROMPTS, responses: Sequence[str] = RESPONSES
) -> list[float]:
    """Each conversation alone; the head on the last token, whatever the token is."""
    model: Any = LlamaForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.model(torch.tensor([chat_ids(prompt, response)])).last_hidden_state
        scores.append(model.score(hidden)[0, -1, 0].item())
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 100, None])
def test_a_reward_model_scores_each_conversation_as_if_alone(
    tiny_reward_model: Path, batch_tokens: int | None
) -> None:
    found, _ = scored(tiny_reward_model, batch_tokens=batch_tokens)
    assert found == pytest.approx(last_token_scores(tiny_reward_model), abs=1e-5)
    assert len(set(found)) == 4


def test_the_conversation_goes_through_the_reward_models_template(tiny_reward_model: Path) -> None:
    """With the roles of several turns, and one BOS."""
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "more")]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    prompt = Prompt("p", "hi\nmore", messages)
    _, (inputs,) = scored(tiny_reward_model, [prompt], ["yes"])
    ids = inputs["input_ids"][0].tolist()
    text = "<system>be kind<user>hi<assistant>hello<eos><user>more<assistant>yes<eos>"
    assert ids == [0, *byte_tokenizer()(text)["input_ids"]]
    assert ids.count(0) == 1
    assert inputs["attention_mask"][0].tolist() == [1] * len(ids)


def test_a_template_and_a_tokenizer_that_both_add_a_bos_add_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template="{{ bos_token }}{{ bos_token }}{{ messages[-1]['content'] }}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, (inputs,) = scored(tmp_path, PROMPTS[:1], ["ab"])
    assert inputs["input_ids"].tolist() == [[0, *byte_tokenizer()("ab")["input_ids"]]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("model_padding", "tokenizer_padding"),
    [(2, "<pad>"), (None, None), (None, "<pad>"), (None, "<eos>"), (2, None), (2, "<eos>")],
)
def test_the_score_is_read_at_the_last_token_whatever_pads(
    tmp_path: Path, model_padding: int | None, tokenizer_padding: str | None, side: str
) -> None:
    """A decoder is read at the last token that is not padding: where EOS pads, that would be the one before EOS."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=model_padding))
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer_padding
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    found, _ = scored(tmp_path)
    assert found == pytest.approx(last_token_scores(tmp_path), abs=1e-5)


@pytest.mark.parametrize("end", ["<bos>", "<eos>", "<pad>"])
def test_the_score_is_read_at_the_last_token_whatever_that_is(tmp_path: Path, end: str) -> None:
    """For a model without padding, where any token might have been taken to pad."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=None)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(chat_template="{{ messages[-1]['content'] }}" + end)
    tokenizer.save_pretrained(tmp_path)
    found, _ = scored(tmp_path)
    with torch.no_grad():
        alone = [  # one conversation needs no padding, and is read at its last token
            model(torch.tensor([byte_tokenizer()(response + end)["input_ids"]])).logits.item()
            for response in RESPONSES
        ]
    assert found == pytest.approx(alone, abs=1e-5)


def test_a_model_whose_own_padding_is_its_end_token_is_read_as_it_reads_itself(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        alone = [
            model(torch.tensor([chat_ids(*pair)])).logits.item()
            for pair in zip(PROMPTS, RESPONSES, strict=True)
        ]
    assert scored(tmp_path)[0] == pytest.approx(alone, abs=1e-5)


def pair_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Like BERT's: BOS, prompt, EOS, response, EOS; the response is of type 1; no chat template."""
    backend = byte_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 0), ("<eos>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **settings,
    )


def encoder_shape(**changes: Any) -> dict[str, Any]:
    shape = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**shape, "intermediate_size": 64, "pad_token_id": 2, "num_labels": 1, **changes}


def test_a_model_without_template_gets_a_text_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**encoder_shape(initializer_range=0.3))).eval()
    model.save_pretrained(tmp_path)
    tokenizer = pair_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    found, (inputs,) = scored(tmp_path)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            expected.append(
                model(**tokenizer([prompt.text], [response], return_tensors="pt")).logits[0, 0].item()
            )
    assert found == pytest.approx(expected, abs=1e-5)
    prompt, response = byte_tokenizer()("x")["input_ids"], byte_tokenizer()(RESPONSES[2])["input_ids"]
    expected_ids = [0, *prompt, 1, *response, 1]
    row = next(
        number for number, ids in enumerate(inputs["input_ids"].tolist()) if ids[:3] == expected_ids[:3]
    )
    for name, values in {
        "input_ids": expected_ids,
        "token_type_ids": [0] * 3 + [1] * (len(response) + 1),
        "attention_mask": [1] * len(expected_ids),
    }.items():
        padded = inputs[name][row].tolist()
        assert padded[: len(values)] == values
        assert set(padded[len(values) :]) <= {2 if name == "input_ids" else 0}


def test_an_empty_response_is_still_a_pair(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**encoder_shape())).save_pretrained(tmp_path)
    pair_tokenizer().save_pretrained(tmp_path)
    _, (inputs,) = scored(tmp_path, PROMPTS[:1], [""])
    assert inputs["input_ids"].tolist() == [[0, *byte_tokenizer()("hi")["input_ids"], 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1]]


def test_conversations_over_max_tokens_score_nan(tiny_reward_model: Path) -> None:
    lengths = [len(chat_ids(prompt, response)) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    everything, _ = scored(tiny_reward_model)
    limit = sorted(lengths)[1]
    found, inputs = scored(tiny_reward_model, max_tokens=limit)
    for score, expected, length in zip(found, everything, lengths, strict=True):
        assert math.isnan(score) if length > limit else score == pytest.approx(expected, abs=1e-5)
    assert sum(math.isnan(score) for score in found) == 2
    assert max(batch["input_ids"].shape[1] for batch in inputs) == limit


def test_nothing_fits(tiny_reward_model: Path) -> None:
    found, inputs = scored(tiny_reward_model, max_tokens=1)
    assert all(math.isnan(score) for score in found)
    assert not inputs


def test_the_longest_conversation_is_what_model_and_tokenizer_take(tmp_path: Path) -> None:
    """RoBERTa's positions start after the padding token's: of 34, 31 are left, as its tokenizer says."""
    config = RobertaConfig(**encoder_shape(max_position_embeddings=34))
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    pair_tokenizer(model_max_length=31).save_pretrained(tmp_path)
    prompt = prompt_of("a" * 20)
    found, _ = scored(tmp_path, [prompt] * 2, ["b" * 8, "b" * 9])  # 31 and 32 tokens
    assert math.isfinite(found[0])
    assert math.isnan(found[1])


def test_a_llama_takes_as_many_tokens_as_it_has_positions(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=1, max_position_embeddings=24)).save_pretrained(
        tmp_path
    )
    byte_tokenizer().save_pretrained(tmp_path)
    room = 24 - len(chat_ids(PROMPTS[0], ""))
    found, _ = scored(tmp_path, PROMPTS[:1] * 2, ["b" * room, "b" * (room + 1)])
    assert math.isfinite(found[0])
    assert math.isnan(found[1])


def test_a_reward_model_has_one_logit(tmp_path: Path, tiny_policy: Path) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=2)).save_pretrained(tmp_path)
    key = r"^data\.reward\.init_args\.pretrained='.*'"
    with pytest.raises(
        UserError,
        match=rf"{key} has 2 logits, and a reward is one: say which with data\.reward\.init_args\.label, from 0 to 1$",
    ):
        SequenceClassificationReward(str(tmp_path)).check()
    with pytest.raises(UserError, match=f"{key} is a LlamaForCausalLM, not a sequence-classification model"):
        SequenceClassificationReward(str(tiny_policy)).check()


@pytest.mark.parametrize(("setting", "value"), [("batch_tokens", 0), ("max_tokens", 0), ("max_tokens", -5)])
def test_reward_model_settings_out_of_range(setting: str, value: int) -> None:
    message = rf"^SequenceClassificationReward\.{setting}={value} must be at least 1$"
    with pytest.raises(ValueError, match=message):
        SequenceClassificationReward("model", **{setting: value})


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_reward_model_dtype(tiny_reward_model: Path, dtype: Any, expected: torch.dtype) -> None:
    reward = SequenceClassificationReward(str(tiny_reward_model), dtype=dtype)
    reward.load(CPU)
    model: Any = reward._model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training


def test_between_phases_the_model_waits_or_is_read_again(tiny_reward_model: Path) -> None:
    for place in ("host", "free"):
        reward = SequenceClassificationReward(str(tiny_reward_model), between_phases=place)  # type: ignore[arg-type]
        reward.load(CPU)
        before, model = reward.score(PROMPTS, RESPONSES), reward._model
        reward.unload()
        assert (reward._model is model) == (place == "host")
        reward.load(CPU)
        assert reward.score(PROMPTS, RESPONSES) == before
