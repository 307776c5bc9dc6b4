"""Scores of ``SequenceClassificationReward`` side by side with one row a response.

Both arms score the same conversations with the same weights (random ones, in the shape of ``--model``). A gate comes
first: in float32 the scores must agree within 1e-5.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import arms
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sppo_lightning.rewards import SequenceClassificationReward
from sppo_lightning.types import Message, Prompt

WORDS = ["river", "stone", "cloud", "amber", "violet", "copper", "meadow", "falcon", "harbor", "lantern"]


def reward_model(shape: str, folder: str) -> None:
    """Write a reward model with random weights in the shape of another model."""
    tokenizer = AutoTokenizer.from_pretrained(shape)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(shape, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text(number: int, words: int) -> str:
    """Return a text of about ``words`` tokens that starts like no other."""
    return " ".join(WORDS[(number + place * (number + 1)) % len(WORDS)] for place in range(words))


def conversations(settings: argparse.Namespace) -> tuple[list[Prompt], list[str]]:
    """Return prompts, each repeated for its responses, and the responses."""
    prompts, responses = [], []
    for number in range(settings.prompts):
        said = f"{number} {text(number, settings.prompt_tokens)}"
        prompt = Prompt(str(number), said, (Message(role="user", content=said),))
        for sample in range(settings.responses):
            prompts.append(prompt)
            responses.append(f"{sample} {text(7 * number + sample, settings.response_tokens)}")
    return prompts, responses


@torch.inference_mode()
def one_row_each(
    reward: SequenceClassificationReward, prompts: list[Prompt], responses: list[str]
) -> list[float]:
    """Score each conversation as a row of its own, padded, in batches of 16."""
    model, tokenizer = reward._model, reward._tokenizer
    assert model is not None
    assert tokenizer is not None
    tokenizer.padding_side = "right"
    scores: list[float] = []
    for start in range(0, len(prompts), 16):
        chats = [
            [*prompt.messages, {"role": "assistant", "content": response}]
            for prompt, response in zip(
                prompts[start : start + 16], responses[start : start + 16], strict=True
            )
        ]
        batch = tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True)
        scores += model(**batch.to(model.device)).logits[:, 0].float().tolist()
    return scores


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="whose shape, tokenizer and chat template are taken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of A B B A, after one warm-up")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    device = torch.device(settings.device)
    prompts, responses = conversations(settings)
    if settings.arm:
        reward = SequenceClassificationReward(settings.folder, dtype="bfloat16")
        reward.load(device)
        tokens = sum(len(reward._encode(*row)["input_ids"]) for row in zip(prompts, responses, strict=True))

        def shared() -> int:
            reward.score(prompts, responses)
            return tokens

        def alone() -> int:
            one_row_each(reward, prompts, responses)
            return tokens

        rounds: dict[str, Callable[[], int]] = {"shared": shared, "alone": alone}
        arms.serve(rounds[settings.arm], device)
        return
    with tempfile.TemporaryDirectory() as folder:
        reward_model(settings.model, folder)
        gate = SequenceClassificationReward(folder, dtype="float32")
        gate.load(device)
        few = slice(0, 2 * settings.responses)
        ours = torch.tensor(gate.score(prompts[few], responses[few]).rewards)
        theirs = torch.tensor(one_row_each(gate, prompts[few], responses[few]))
        apart = (ours - theirs).abs().max().item()
        if not apart < 1e-5:
            raise SystemExit(f"the scores differ by {apart:.2g}: nothing is timed")
        del gate
        arms.sys.argv += ["--folder", folder]
        results = arms.alternate(["shared", "alone"], rounds=settings.rounds)
    title = (
        f"scores: P={settings.prompt_tokens} R={settings.response_tokens} n={settings.responses}, "
        f"{settings.prompts} prompts, bfloat16, {device}, gate {apart:.1g}"
    )
    arms.report(title, results, settings.json, vars(settings))


if __name__ == "__main__":
    main()
