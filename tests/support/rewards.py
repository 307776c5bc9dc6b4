"""Questions to score."""

from __future__ import annotations

from sppo_lightning.types import Message, Prompt


def questions() -> tuple[list[Prompt], list[str]]:
    texts = ["What is the way to the river, please?"] * 3 + ["Why?"] * 2
    prompts = [Prompt(text, text, (Message(role="user", content=text),)) for text in texts]
    return prompts, ["follow the stone road", "", "no", "because", "because of that"]
