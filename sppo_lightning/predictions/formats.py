"""Formats of predictions, a class each."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sppo_lightning.predictions.contract import Prediction, PredictionFormat
from sppo_lightning.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JSONLines(PredictionFormat):
    """``predictions.jsonl``: id, prompt, response and finish reason of each prompt, once.

    A prompt without an answer has an empty response, and the finish reason ``failed``.
    """

    name = "jsonl"
    keeps_unanswered = True

    @property
    def file_name(self) -> str:
        """The file's name in the run's folder."""
        return "predictions.jsonl"

    def records(
        self, predictions: Sequence[Prediction], *, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Mapping[str, Any]]:
        """Return one record a prompt."""
        once = {prediction.prompt.id: prediction for prediction in predictions}
        return [
            {
                "id": prompt_id,
                "prompt": prediction.prompt.text,
                "response": prediction.responses[0].text,
                "finish_reason": prediction.responses[0].finish_reason,
            }
            for prompt_id, prediction in once.items()
        ]


class AlpacaEval(PredictionFormat):
    """What ``alpaca_eval --model_outputs`` reads: a list of ``instruction``, ``output`` and ``generator``.

    The prompt file must be AlpacaEval's own, in its order: the length-controlled win rate looks a prompt's difficulty
    up by its row. So each record of the file has its row; a prompt without an answer has an empty ``output``.
    """

    name = "alpaca_eval"
    suffix = ".json"  # AlpacaEval reads no JSON lines
    keeps_unanswered = True

    def records(
        self, predictions: Sequence[Prediction], *, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Mapping[str, Any]]:
        """Return one record for each of the file, with its ``dataset`` where it names one."""
        return [
            {
                **_named(prediction.prompt, ["dataset"]),
                "instruction": prediction.prompt.text,
                "output": prediction.responses[0].text,
                "generator": model,
            }
            for prediction in predictions
        ]


class ArenaHard(PredictionFormat):
    """What Arena-Hard's ``gen_judgment.py`` reads from ``data/<bench>/model_answer/<model>.jsonl``, v0.1 and v2.0.

    Prompts without an answer are left out, as Arena-Hard leaves out answers that failed. ``token_len`` counts the
    policy's tokens; Arena-Hard's own is of GPT-4o's tokenizer, by its ``utils/add_markdown_info.py``.
    """

    name = "arena_hard"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require the question's id."""
        _require(prompts, _UIDS, self.name)

    def records(
        self, predictions: Sequence[Prediction], *, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Mapping[str, Any]]:
        """Return one record for each question that was answered."""
        return list(self._records(predictions, model, tokenizer))

    def _records(
        self, predictions: Sequence[Prediction], model: str, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Mapping[str, Any]]:
        for prompt, (response, *_) in (item for item in predictions if item.answered):
            uid = next(iter(_named(prompt, _UIDS).values()))
            tokens = tokenizer(response.text, add_special_tokens=False)["input_ids"] if response.text else []
            yield {
                "uid": uid,
                "ans_id": _answer_id(model, uid, response.text),
                "model": model,
                "messages": [
                    *(dict(turn) for turn in prompt.messages),
                    {"role": "assistant", "content": {"answer": response.text}},
                ],
                "tstamp": time.time(),
                "metadata": {"token_len": len(tokens), **markdown_counts(response.text)},
            }


class MTBench(PredictionFormat):
    """FastChat's answers to MT-Bench's two-turn questions; the second turn is asked after the first answer.

    An answer that could not be given is an empty text: FastChat's judge refuses a file that lacks a question.
    """

    name = "mt_bench"
    keeps_unanswered = True

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require ids, and turns to come after the first."""
        _require(prompts, ["question_id"], self.name)
        for prompt in prompts:
            if not self.follow_ups(prompt):
                raise UserError(
                    f"data.predict_prompts: prompt {prompt.id!r} has no 'turns' of two texts, which predict --format "
                    f"{self.name} needs: name the benchmark's own questions, or another format"
                )

    def follow_ups(self, prompt: Prompt) -> Sequence[str]:
        """Return the question's turns after the first."""
        turns = prompt.metadata.get("turns")
        known = isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)
        return turns[1:] if known and isinstance(turns, list) else ()

    def records(
        self, predictions: Sequence[Prediction], *, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Mapping[str, Any]]:
        """Return one record a question."""
        return [
            {
                "question_id": prompt.metadata["question_id"],
                "answer_id": _answer_id(model, prompt.metadata["question_id"], *turns),
                "model_id": model,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            for prompt, responses in predictions
            for turns in [[response.text for response in responses]]
        ]


FORMATS = {
    kind.name: f"sppo_lightning.predictions.{kind.__name__}"
    for kind in (JSONLines, AlpacaEval, ArenaHard, MTBench)
}
"""Class paths by short name."""

_UIDS = ["uid", "question_id"]
_CODE = re.compile("```([^`]*)```")


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Return how often an answer uses headers, list items and bold type, outside code, as Arena-Hard counts them.

    What stands between fences is taken out wherever else it stands in the answer too.
    """
    for code in _CODE.findall(text):
        text = text.replace(code, "")

    def count(pattern: str) -> int:
        return sum(1 for _ in re.finditer(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _require(prompts: Sequence[Prompt], names: Sequence[str], format: str) -> None:
    lacking = next((prompt for prompt in prompts if not _named(prompt, names)), None)
    if lacking is not None:
        raise UserError(
            f"data.predict_prompts: prompt {lacking.id!r} has no {' or '.join(map(repr, names))}, which predict "
            f"--format {format} needs: name the benchmark's own questions, or another format"
        )


def _named(prompt: Prompt, names: Sequence[str]) -> dict[str, Any]:
    """Return those fields of a prompt's record that are there."""
    return {name: prompt.metadata[name] for name in names if prompt.metadata.get(name) is not None}


def _answer_id(*parts: object) -> str:
    """Return an id that the same answer has again."""
    return uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(map(str, parts))).hex
