"""Policies in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat.conftest import CPU, RunMaker
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sppo_lightning.chat.answers import answer_logps
from sppo_lightning.chat.choices import choose
from sppo_lightning.chat.policies import ChatPolicy, PolicyShelf
from sppo_lightning.export.stored_run import read_run
from sppo_lightning.types import Message, UserError

PROMPT, ANSWER = [0, 60, 61, 62], [70, 71, 1]


def expected(base: Path, adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([PROMPT + ANSWER])).logits[0, len(PROMPT) - 1 : -1]
    logps: torch.Tensor = logits.log_softmax(-1)
    return logps[range(len(ANSWER)), ANSWER]


@pytest.mark.parametrize("first", ["0", "initial"])
def test_adapters_share_one_base(
    make_run: RunMaker, tiny_policy: Path, shelf: PolicyShelf, first: str
) -> None:
    run = read_run(make_run("mine", 0, 1, lora=True))
    names = [first, *({"0", "1", "initial"} - {first})]
    found = {name: shelf.load(choose(name, device=CPU, run=run)) for name in names}
    assert len({id(policy.held) for policy in found.values()}) == 1
    for _ in range(2):  # each as often as one likes, in any order
        for name, policy in found.items():
            adapter = None if name == "initial" else run.folder.kept_policy(int(name))
            logps = answer_logps(policy, PROMPT, ANSWER)
            torch.testing.assert_close(logps, expected(tiny_policy, adapter), atol=1e-5, rtol=0)


def test_whole_models_are_apart_and_can_be_let_go(make_run: RunMaker, shelf: PolicyShelf) -> None:
    run = read_run(make_run("mine", 0, 1))
    first, second = (shelf.load(choose(name, device=CPU, run=run)) for name in ("0", "1"))
    assert first.held is not second.held
    assert shelf.load(first.choice).held is first.held
    shelf.keep([second])
    assert shelf.load(second.choice).held is second.held
    assert shelf.load(first.choice).held is not first.held


def test_the_dtype_that_was_asked_for(tiny_policy: Path) -> None:
    policy = PolicyShelf(CPU, torch.bfloat16).load(choose(str(tiny_policy), device=CPU))
    assert {each.dtype for each in policy.held.model.parameters()} == {torch.bfloat16}


def test_an_adapter_that_does_not_fit(make_run: RunMaker, shelf: PolicyShelf) -> None:
    root = make_run("mine", 0, lora=True)
    (root / "policy/adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"^the adapter \S*policy cannot be read on its base \("):
        shelf.load(choose(str(root), device=CPU))


def test_a_conversation_is_templated_as_the_run_does(make_run: RunMaker, shelf: PolicyShelf) -> None:
    root = make_run("mine", 0)
    config = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(config.replace("data:\n", "data:\n  system_prompt: Be kind.\n"))
    policy = shelf.load(choose(str(root), device=CPU))
    turns = [Message(role="user", content="Hi"), Message(role="assistant", content="Yo")]
    ids = policy.encode([*turns, Message(role="user", content="Why?")])
    assert (
        policy.tokenizer.decode(ids) == "<bos><system>Be kind.<user>Hi<assistant>Yo<eos><user>Why?<assistant>"
    )


def test_without_a_template_only_the_last_text_counts(make_run: RunMaker, shelf: PolicyShelf) -> None:
    policy = shelf.load(choose(str(make_run("plain", chat_template="plain")), device=CPU))
    assert not policy.conversational
    turns = [Message(role="user", content="Hi"), Message(role="assistant", content="Yo")]
    assert policy.tokenizer.decode(policy.encode([*turns, Message(role="user", content="Why?")])) == "Why?"


def test_vocabularies(policy: ChatPolicy, shelf: PolicyShelf, make_run: RunMaker) -> None:
    other = shelf.load(choose(str(make_run("mine", 0)), device=CPU))
    assert policy.same_vocabulary(other)
    other.tokenizer.add_tokens(["new"])
    assert not policy.same_vocabulary(other)
