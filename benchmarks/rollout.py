"""Rollouts of ``HFGenerator`` side by side with transformers' ``generate(num_return_sequences)``.

Both arms sample the same number of responses to the same prompts from the same weights, alternating A B B A in one
process. A gate comes first: the greedy answers of both must be the same tokens. Only the ratio within one run counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sppo_lightning.generation import HFGenerator, SampleRequest
from sppo_lightning.policy import keep_head_input_contiguous

TEMPERATURE = 0.8
TOP_P = 0.95


class Policy:
    """The model under test, as an engine sees it."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_token_ids = frozenset({model.config.eos_token_id})

    def sampling_model(self) -> Any:
        """Return the model."""
        return self.model


def prompts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[tuple[int, ...]]:
    """Return ``count`` different prompts of exactly ``length`` tokens."""
    words = tokenizer("The quick brown fox jumps over the lazy dog and runs along the river. ")["input_ids"]
    return [tuple((words[index % len(words) :] + words * length)[:length]) for index in range(count)]


def ours(policy: Policy, batch: list[tuple[int, ...]], n: int, new_tokens: int) -> int:
    """Sample with HFGenerator; return the number of tokens."""
    engine = HFGenerator(new_tokens, TEMPERATURE, top_p=TOP_P, batch_size=len(batch) * n)
    engine.load(policy)
    requests = [SampleRequest(ids, tuple(range(n * row, n * row + n))) for row, ids in enumerate(batch)]
    return sum(len(r.token_ids) for answer in engine.generate(requests) for r in answer.responses)


def theirs(policy: Policy, batch: list[tuple[int, ...]], n: int, new_tokens: int) -> int:
    """Sample with ``generate``; return the number of tokens up to each response's end."""
    output = policy.model.generate(
        torch.tensor(batch),
        attention_mask=torch.ones(len(batch), len(batch[0]), dtype=torch.long),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=new_tokens,
        num_return_sequences=n,
    )
    total = 0
    for row in output[:, len(batch[0]) :].tolist():
        ends = [position for position, token in enumerate(row) if token in policy.end_token_ids]
        total += ends[0] + 1 if ends else new_tokens
    return total


def same_greedy_answers(policy: Policy, batch: list[tuple[int, ...]], new_tokens: int) -> bool:
    """Whether both arms give the same greedy tokens."""
    engine = HFGenerator(new_tokens, TEMPERATURE)
    engine.load(policy)
    found = {
        a.request: a.responses[0].token_ids for a in engine.generate([SampleRequest(p, ()) for p in batch])
    }
    for row, ids in enumerate(batch):
        output = policy.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens)
        if tuple(output[0, len(ids) :].tolist()) != found[row]:
            return False
    return True


def timed(arm: Callable[[], int]) -> tuple[float, float]:
    """Return tokens per wall second and per CPU second."""
    wall, cpu = time.perf_counter(), sum(os.times()[:2])
    tokens = arm()
    return tokens / (time.perf_counter() - wall), tokens / (sum(os.times()[:2]) - cpu)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of A B B A, after one warm-up")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    gate = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    batch = prompts(tokenizer, arguments.prompts, arguments.prompt_tokens)
    if not same_greedy_answers(Policy(gate, tokenizer), batch[:2], 16):
        raise SystemExit("the greedy answers differ: nothing is timed")
    del gate
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    keep_head_input_contiguous(model)
    policy = Policy(model, tokenizer)
    arms = {"ours": ours, "generate": theirs}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    with torch.inference_mode():
        for number in range(arguments.rounds + 1):
            for name in ("ours", "generate", "generate", "ours"):
                size = (arguments.responses, arguments.new_tokens)
                rate = timed(lambda name=name, size=size: arms[name](policy, batch, *size))
                if number:
                    rates[name].append(rate)
    median = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in rates.items()
    }
    shape = f"P={arguments.prompt_tokens} R={arguments.new_tokens} n={arguments.responses}"
    print(f"{shape}, bfloat16, load {os.getloadavg()}")
    for name, (wall, cpu) in median.items():
        print(f"{name:>10}  {wall:8.1f} tokens/s  {cpu:8.1f} tokens/CPU-s")
    ratio = median["ours"][0] / median["generate"][0]
    print(f"     ratio  {ratio:8.2f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"settings": vars(arguments), "median": median}, default=str, indent=2)
        )


if __name__ == "__main__":
    main()
