"""Judges on a loopback server, and files of answers for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.servers import Answer, Request

from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.types import Rollout

SHOWN = re.compile(r"<answer_a>\n(.*?)\n</answer_a>.*?<answer_b>\n(.*?)\n</answer_b>", re.DOTALL)


def completion(text: Any, *, finish_reason: str = "stop", logprobs: Any = None) -> Answer:
    choice = {"message": {"content": text}, "finish_reason": finish_reason, "logprobs": logprobs}
    return Answer(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def texts(request: Request) -> tuple[str, str]:
    """The two answers that a judge is shown, first and second."""
    found = SHOWN.search(request.body["messages"][0]["content"])
    assert found is not None
    return found[1], found[2]


def prefers(better: Callable[[str, str], str]) -> Callable[[Request], Answer]:
    """A server whose judge writes what ``better`` says of the answers it is shown: A, B or tie."""
    return lambda request: completion(f"I have thought about it.\n{better(*texts(request))}")


def longer(first: str, second: str) -> str:
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"


def labelled(first: float, second: float, *, tokens: Sequence[str] = ("A", "B")) -> Any:
    """Log-probs of a one-token answer."""
    likeliest = [
        {"token": token, "logprob": logprob} for token, logprob in zip(tokens, (first, second), strict=True)
    ]
    return {"content": [{"token": tokens[0], "logprob": first, "top_logprobs": likeliest}]}


def write_answers(path: Path, outputs: Sequence[str], **fields: Any) -> Path:
    """A file as ``predict --format alpaca_eval`` writes it."""
    rows = [
        {"instruction": f"Question {number}?", "output": output, "generator": path.stem, **fields}
        for number, output in enumerate(outputs)
    ]
    path.write_text(json.dumps(rows))
    return path


def write_run(
    root: Path,
    answers: Sequence[Sequence[str]],
    *,
    reward: str = "support.runs.variety_reward",
    rewards: Sequence[Sequence[float | None]] | None = None,
) -> Path:
    """A run's folder with held-out answers after 0, 1, … iterations, scored by how many characters a text has."""
    prompts = root.parent / f"{root.name}-prompts.jsonl"
    ids = range(len(answers[0]))
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"Question {n}?"}) + "\n" for n in ids))
    data = {
        "prompts": str(prompts),
        "eval_prompts": str(prompts),
        "reward": {"class_path": "sppo_lightning.rewards.FunctionReward", "init_args": {"function": reward}},
    }
    root.mkdir()
    (root / "config.yaml").write_text(json.dumps({"seed_everything": 1, "data": data}))
    for finished, texts_after in enumerate(answers):
        rows = [
            Rollout(
                f"p{n}",
                0,
                f"Question {n}?",
                text,
                (7, 1),
                "stop",
                float(len(set(text))) if rewards is None else rewards[finished][n],
            )
            for n, text in enumerate(texts_after)
        ]
        write_rollouts(root / f"evaluations/{finished:03d}/rollouts.parquet", rows)
    return root
