"""Rollouts of ``HFGenerator`` side by side with transformers' ``generate(num_return_sequences)``.

Both arms sample the same number of responses to the same prompts from the same weights. A gate comes first: the
greedy answers of both must be the same tokens.

``--server`` adds a server with OpenAI's API that was started by hand with the same model and ``--dtype``, e.g. vLLM.
Its arm's CPU seconds are the client's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arms
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sppo_lightning.generation import (
    ContinuousBatchingGenerator,
    Generator,
    HFGenerator,
    OffPolicy,
    OpenAIServerGenerator,
    SampleRequest,
)
from sppo_lightning.policy.loading import keep_head_input_contiguous

SAMPLING = {"temperature": 0.8, "top_p": 0.95}
ENGINES: dict[str, Callable[..., Generator]] = {
    "HFGenerator": HFGenerator,
    "unrecorded": partial(HFGenerator, cuda_graphs=False),
    "continuous": ContinuousBatchingGenerator,
}


class Policy:
    """The model under test, as an engine sees it."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_token_ids = frozenset({model.config.eos_token_id})
        self.embedding_rows = model.get_input_embeddings().num_embeddings

    def sampling_model(self) -> Any:
        """Return the model."""
        return self.model


def load(path: str, dtype: torch.dtype, device: torch.device) -> Policy:
    """Load model and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    keep_head_input_contiguous(model)
    return Policy(model, AutoTokenizer.from_pretrained(path))


def prompts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[tuple[int, ...]]:
    """Return ``count`` different prompts of exactly ``length`` tokens."""
    words = tokenizer("The quick brown fox jumps over the lazy dog and runs along the river. ")["input_ids"]
    return [tuple((words[index % len(words) :] + words * length)[:length]) for index in range(count)]


def sample(engine: Generator, policy: Policy, batch: list[tuple[int, ...]], n: int) -> int:
    """Sample with an engine; return the number of tokens."""
    engine.load(policy)  # type: ignore[arg-type]
    requests = [SampleRequest(ids, tuple(range(n * row, n * row + n))) for row, ids in enumerate(batch)]
    tokens = sum(len(r.token_ids) for answer in engine.generate(requests) for r in answer.responses)
    engine.unload()
    return tokens


@torch.inference_mode()
def generate(policy: Policy, batch: list[tuple[int, ...]], n: int, new_tokens: int) -> int:
    """Sample with ``generate``; return the number of tokens up to each response's end."""
    ids = torch.tensor(batch, device=policy.model.device)
    output = policy.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=new_tokens,
        num_return_sequences=n,
        **SAMPLING,
    )
    total = 0
    for row in output[:, len(batch[0]) :].tolist():
        ends = [position for position, token in enumerate(row) if token in policy.end_token_ids]
        total += ends[0] + 1 if ends else new_tokens
    return total


def same_greedy_answers(policy: Policy, batch: list[tuple[int, ...]], new_tokens: int) -> bool:
    """Whether HFGenerator and ``generate`` give the same greedy tokens."""
    engine = HFGenerator(max_new_tokens=new_tokens, temperature=1.0)
    engine.load(policy)  # type: ignore[arg-type]
    found = {
        a.request: a.responses[0].token_ids for a in engine.generate([SampleRequest(p, ()) for p in batch])
    }
    for row, ids in enumerate(batch):
        prompt = torch.tensor([ids], device=policy.model.device)
        output = policy.model.generate(prompt, do_sample=False, max_new_tokens=new_tokens)
        if tuple(output[0, len(ids) :].tolist()) != found[row]:
            return False
    return True


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of A B B A, after one warm-up")
    parser.add_argument("--continuous", action="store_true", help="also time continuous batching")
    parser.add_argument(
        "--unrecorded", action="store_true", help="also time HFGenerator without its CUDA graphs"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--server", help="also time the server with this base_url, which serves --model")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    device = torch.device(settings.device)
    if settings.arm:
        policy = load(settings.model, getattr(torch, settings.dtype), device)
        batch = prompts(policy.tokenizer, settings.prompts, settings.prompt_tokens)
        n, new = settings.responses, settings.new_tokens
        if settings.arm == "generate":
            arms.serve(lambda: generate(policy, batch, n, new), device)
            return
        # one engine for all rounds, as a run has it
        make = ENGINES.get(settings.arm) or partial(
            OpenAIServerGenerator, settings.server, OffPolicy(), model=settings.model
        )
        engine = make(max_new_tokens=new, **SAMPLING)
        arms.serve(lambda: sample(engine, policy, batch, n), device)
        return
    gate = load(settings.model, torch.float32, device)
    if not same_greedy_answers(gate, prompts(gate.tokenizer, 2, settings.prompt_tokens), 16):
        raise SystemExit("the greedy answers differ: nothing is timed")
    del gate
    others = [name for name in ("unrecorded", "continuous") if getattr(settings, name)]
    names = ["HFGenerator", *others, *(["server"] if settings.server else []), "generate"]
    results = arms.alternate(names, rounds=settings.rounds)
    title = (
        f"rollouts: P={settings.prompt_tokens} R={settings.new_tokens} n={settings.responses}, "
        f"{settings.prompts} prompts, {settings.dtype}, {device}"
    )
    arms.report(title, results, settings.json, vars(settings))


if __name__ == "__main__":
    main()
