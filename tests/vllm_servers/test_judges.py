"""Judges on a real vLLM: a small model that has learnt three verdicts by heart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from support.vllm_server import VLLMServer, vllm_server
from transformers import LlamaForCausalLM

from sppo_lightning.judging.by_server import ServerJudge
from sppo_lightning.judging.contract import Answer, Shown
from sppo_lightning.judging.verdict_formats import LabelProbabilities
from sppo_lightning.rewards import OpenAIJudge
from sppo_lightning.rewards.pairwise import Comparison
from sppo_lightning.types import Message, Prompt

pytestmark = pytest.mark.vllm

ASKED = "{prompt}: {first} / {second}"
QUESTION = Prompt("q", "hot?", (Message(role="user", content="hot?"),))
VERDICTS = {("sun", "ice"): "A", ("ice", "sun"): "B", ("sun", "fire"): "tie", ("fire", "sun"): "tie"}


def tokens_of(first: str, second: str) -> list[int]:
    message = ASKED.format(prompt=QUESTION.text, first=first, second=second)
    found = byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True
    )
    return list(found["input_ids"])


def learn(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    examples = [
        (tokens_of(*shown), [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for shown, said in VERDICTS.items()
    ]
    for _ in range(400):
        losses = []
        for prompt, answer in examples:
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(model(input_ids=ids, labels=labels).loss)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            return
    raise AssertionError(f"the judge has not learnt its verdicts: {loss:.3f}")


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(tiny_config(**shape))
    learn(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge_server(judge_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    log = tmp_path_factory.mktemp("log") / "vllm"
    with vllm_server(judge_model, log, "--served-model-name", "judge", "--max-model-len", "192") as found:
        yield found


def test_written_verdicts(judge_server: VLLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A win, a loss and a tie, each asked in both orders."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    judge = OpenAIJudge(judge_server.url, "judge", instructions=ASKED, max_tokens=8)
    judge.load(torch.device("cpu"))
    shown = [("sun", "ice"), ("ice", "sun"), ("sun", "fire")]
    assert list(judge.compare([Comparison(QUESTION, *each) for each in shown])) == [1.0, 0.0, 0.5]
    judge.unload()


def test_probabilities_of_labels_are_the_models_own(
    judge_server: VLLMServer, judge_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    judge = ServerJudge(
        judge_server.url, "judge", format=LabelProbabilities(instructions=ASKED, top_logprobs=20)
    )
    asked = [Shown(QUESTION, Answer(QUESTION, one), Answer(QUESTION, two)) for one, two in list(VERDICTS)[:2]]
    found = dict(judge.judge(asked))
    model = LlamaForCausalLM.from_pretrained(judge_model).eval()
    first, second = byte_tokenizer()("AB", add_special_tokens=False)["input_ids"]
    for number, shown in enumerate(list(VERDICTS)[:2]):
        prompt = tokens_of(*shown)
        with torch.no_grad():
            logps = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        own = torch.stack([logps[first], logps[second]]).softmax(0)[0]
        assert found[number].first_wins == pytest.approx(float(own), abs=1e-3)
        assert found[number].prompt_tokens == len(prompt)
        assert found[number].completion_tokens == 1
