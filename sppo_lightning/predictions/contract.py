"""What a format of predictions is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo_lightning.types import Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prediction(NamedTuple):
    """A policy's answers to one record of the prompt file."""

    prompt: Prompt
    responses: tuple[Response, ...]  # one a turn; one that could not be given has a drop reason and no text

    @property
    def answered(self) -> bool:
        """Whether every turn has an answer."""
        return all(response.drop_reason is None for response in self.responses)


class PredictionFormat(ABC):
    """A format, chosen by ``data.predict_format``, or by its short name with ``predict --format``.

    Only :meth:`records` is needed.

    Args:
        model: the policy's name in the file; ``None``: the run folder's name.

    Attributes:
        name: short, in the file's name; empty: the class's.
        suffix: ``.jsonl`` for a record a line, ``.json`` for a list of records.
        keeps_unanswered: whether a prompt without an answer has a record all the same.
    """

    name: str = ""
    suffix: str = ".jsonl"
    keeps_unanswered: bool = False

    def __init__(self, model: str | None = None) -> None:
        self.model = model

    @property
    def file_name(self) -> str:
        """The file's name in the run's folder."""
        return f"predictions-{self.name or type(self).__name__}{self.suffix}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if a prompt lacks what the format needs.

        Called before any model loads.

        Args:
            prompts: one for each record of the file.
        """

    def follow_ups(self, prompt: Prompt) -> Sequence[str]:
        """Return what the user says after each answer of the policy but the last."""
        return ()

    @abstractmethod
    def records(
        self, predictions: Sequence[Prediction], *, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Mapping[str, Any]]:
        """Return what is written, of JSON's own types.

        Args:
            predictions: one for each record of the prompt file, in its order.
            model: the policy's name.
            tokenizer: the policy's.
        """

    def content(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Return the file's content."""
        if self.suffix == ".json":
            return json.dumps(records, ensure_ascii=False, indent=2) + "\n"
        return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
