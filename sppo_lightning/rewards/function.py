"""A reward made of any Python function."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from sppo_lightning.rewards.protocol import Reward
from sppo_lightning.types import Prompt

RewardFunction = Callable[..., Sequence[float | None]]


class FunctionReward(Reward):
    """Scores with a Python function, of either of two signatures.

    ``function(prompts, responses, metadata) -> list[float]`` gets the prompts' texts, the responses, and one dict a
    prompt with its metadata, ``id``, ``messages`` and, where there is one, ``answer``.

    ``function(prompts, completions, **columns) -> list[float | None]``, as TRL's GRPOTrainer calls it, by keyword, is
    recognised by a parameter called ``completions``. ``columns`` are the fields of the prompts' records, a list each,
    with ``None`` where a record lacks one; ``None`` for a reward drops the response.

    Args:
        function: dotted path of the function.
        conversational: give a function of TRL's signature ``prompts`` and ``completions`` as lists of messages, as TRL
            does for conversational data sets.
    """

    def __init__(self, function: RewardFunction, conversational: bool = False) -> None:
        self.function = function
        self.conversational = conversational
        parameters = _parameters(function)
        self._columns: set[str] | None = None  # that the function takes; None: it is not of TRL's signature
        self._takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        names = [one.name for one in parameters]
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._required = {one.name for one in parameters if one.default is one.empty and one.kind in by_name}
        if "completions" in names:
            self._columns = set(names)
            missing = [one.name for one in parameters if one.name in UNKNOWN and one.default is one.empty]
            if missing:
                raise ValueError(
                    f"FunctionReward.function needs {missing[0]!r}, which only TRL's trainer has"
                )
        elif conversational:
            raise ValueError(
                "FunctionReward.conversational is for a function that has a parameter called 'completions': leave it "
                "out"
            )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Call the function once for all responses."""
        fields = [_fields(prompt) for prompt in prompts]
        if self._columns is None:
            found = self.function([prompt.text for prompt in prompts], list(responses), fields)
        else:
            found = self.function(**self._arguments(prompts, responses, fields))
        if not isinstance(found, list):
            return cast("list[float]", found)  # which the caller refuses by name
        return [math.nan if reward is None else reward for reward in found]

    def _arguments(
        self, prompts: Sequence[Prompt], responses: Sequence[str], fields: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what TRL would call the function with."""
        assert self._columns is not None
        there = {name for record in fields for name in record} | self._required
        names = sorted(there - {"prompt", "completion", "messages", "prompts", "completions"})
        arguments: dict[str, Any] = {name: [record.get(name) for record in fields] for name in names}
        if self.conversational:
            arguments["prompts"] = [record["messages"] for record in fields]
            arguments["completions"] = [
                [{"role": "assistant", "content": response}] for response in responses
            ]
        else:
            arguments |= {"prompts": [prompt.text for prompt in prompts], "completions": list(responses)}
        return arguments if self._takes_all else {k: v for k, v in arguments.items() if k in self._columns}


UNKNOWN = ("completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of TRL's that a reward here is not given."""


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return []


def _fields(prompt: Prompt) -> dict[str, Any]:
    """Return a record's fields, which the function may change: what it changes belongs to no prompt."""
    fields = copy.deepcopy({**prompt.metadata, "messages": list(prompt.messages)}) | {"id": prompt.id}
    return fields if prompt.answer is None else {**fields, "answer": prompt.answer}
