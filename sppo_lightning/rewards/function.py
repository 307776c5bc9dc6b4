"""A reward made of any Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sppo_lightning.rewards.protocol import Reward
from sppo_lightning.types import Prompt

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


class FunctionReward(Reward):
    """Scores with ``function(prompts, responses, metadata) -> list[float]``.

    Args:
        function: dotted path of the function. It gets the prompts' texts, the responses, and one dict a
            prompt with its metadata, ``id``, ``messages`` and, where there is one, ``answer``.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Call the function once for all responses."""
        metadata = []
        for prompt in prompts:
            fields = {**prompt.metadata, "id": prompt.id, "messages": list(prompt.messages)}
            metadata.append(fields if prompt.answer is None else {**fields, "answer": prompt.answer})
        return self.function([prompt.text for prompt in prompts], list(responses), metadata)
