"""Reward models that are LoRA adapters, and those with several logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import byte_tokenizer, tiny_config
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from sppo_lightning.rewards import SequenceClassificationReward
from sppo_lightning.types import Message, Prompt, UserError

CPU = torch.device("cpu")
PROMPT = Prompt("p", "Hi", (Message(role="user", content="Hi"),))
RESPONSES = ["Ho", "Hello there"]


def scores(folder: Path, **settings: Any) -> list[float]:
    reward = SequenceClassificationReward(str(folder), **settings)
    reward.check()
    reward.load(CPU)
    return list(reward.score([PROMPT] * 2, RESPONSES).rewards)


def expected(model: Any, label: int = 0) -> list[float]:
    tokenizer = byte_tokenizer()
    found = []
    for response in RESPONSES:
        said = [*PROMPT.messages, Message(role="assistant", content=response)]
        ids = tokenizer.apply_chat_template(said, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(float(model(ids).logits[0, label]))
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Any]:
    """An adapter for sequence classification on a causal language model, all of its weights random."""
    base = tmp_path / "base"
    torch.manual_seed(3)
    LlamaForCausalLM(tiny_config()).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    return folder, adapted.eval()


def test_an_adapter_is_merged_into_its_base(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = adapter
    assert scores(folder) == pytest.approx(expected(model), abs=1e-4)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(UserError, match=r"^data\.reward\.init_args\.base='.*base': no such model"):
        scores(folder)
    assert scores(folder, base=str(tmp_path / "moved")) == pytest.approx(expected(model), abs=1e-4)


def test_a_base_that_does_not_fit_the_adapter(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    LlamaForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(UserError, match=r"adapter' does not fit its base '.*other'"):
        scores(adapter[0], base=str(other))


def test_adapters_that_give_no_reward(
    adapter: tuple[Path, Any], tmp_path: Path, tiny_reward_model: Path
) -> None:
    folder, _ = adapter
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError, match=r"is an adapter for CAUSAL_LM, which gives no reward"):
        scores(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot be read as an adapter"):
        scores(folder)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is an adapter, which is not merged into quantised weights"):
        scores(folder, quantization="nf4")
    with pytest.raises(UserError, match=r"is no adapter, so that it has no base: leave out base"):
        scores(tiny_reward_model, base=str(folder))


def test_the_logit_that_counts_is_named(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = LlamaForSequenceClassification(tiny_config(num_labels=2)).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for label in (0, 1):
        assert scores(tmp_path, label=label) == pytest.approx(expected(model, label), abs=1e-4)
    with pytest.raises(UserError, match=r"label=2: the model has the logits 0 to 1"):
        scores(tmp_path, label=2)
