"""Let a policy answer the records of a prompt file, turn by turn, and write the answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.generation import PolicySource
from sppo_lightning.predictions.contract import Prediction, PredictionFormat
from sppo_lightning.prompts.encoding import EncodingResult
from sppo_lightning.prompts.table import user_text
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import EncodedPrompt, Message, Prompt, Response, Rollout

if TYPE_CHECKING:
    from pathlib import Path

Encode = Callable[[Sequence[Prompt]], EncodingResult]

TOO_LONG = Response((), "", "failed", "prompt_too_long")
NOT_ASKED = Response((), "", "failed", "earlier_turn_failed")


def write_predictions(
    folder: RunFolder,
    records: Sequence[Prompt],
    prompts: Sequence[EncodedPrompt],
    *,
    format: PredictionFormat,
    encode: Encode,
    collector: Collector,
    policy: PolicySource,
) -> tuple[Path, list[str]]:
    """Let ``policy`` answer prompts greedily into a file of the run; return the file, and each of its records as JSON.

    Args:
        folder: of the run.
        records: the prompt of each record of the file, in its order.
        prompts: those that fit, each once.
        format: of the file.
        encode: encodes what is asked after the first turn.
        collector: samples.
        policy: who answers.
    """
    predictions = _predictions(folder, records, prompts, format, encode, collector, policy)
    _warn_of_unanswered(predictions, format)
    found = format.records(
        predictions, model=format.model or folder.root.resolve().name, tokenizer=policy.tokenizer
    )
    place = folder.predictions(format.file_name)
    if collector.ranks.rank == 0:
        write_atomically(place, format.content(found).encode())
        shutil.rmtree(folder.prediction_parts)
    return place, [json.dumps(record, ensure_ascii=False) for record in found]


def check_follow_ups(format: PredictionFormat, records: Sequence[Prompt], encode: Encode) -> None:
    """Try a conversation of several turns, before anything is sampled.

    Raises:
        UserError: if the policy's template does not take it.
    """
    first = next((record for record in records if format.follow_ups(record)), None)
    if first is not None:
        encode([_continued(first, [Response((), "Yes.", "stop")], format.follow_ups(first))])


def _predictions(
    folder: RunFolder,
    records: Sequence[Prompt],
    prompts: Sequence[EncodedPrompt],
    format: PredictionFormat,
    encode: Encode,
    collector: Collector,
    policy: PolicySource,
) -> list[Prediction]:
    store = ShardStore(folder.prediction_parts)
    if collector.ranks.rank == 0:
        shutil.rmtree(store.folder, ignore_errors=True)  # of another policy, perhaps
    collector.ranks.barrier("predictions begin")

    def answers(name: str, asked: Sequence[EncodedPrompt]) -> Mapping[str, Rollout]:
        if not asked:
            return MappingProxyType({})
        rows = collector.collect_greedy(
            store, name, asked, policy=policy, iteration=0, phase="predicting", score=False
        )
        return {row.prompt_id: row for row in rows}

    first = answers("greedy", prompts)
    given = [[_response(first.get(record.id))] for record in records]
    said = [format.follow_ups(record) for record in records]
    for turn in range(1, 1 + max(map(len, said), default=0)):
        open_ones = [number for number, more in enumerate(said) if len(more) >= turn]
        asked = [
            _continued(records[number], given[number], said[number], prompt_id=str(number))
            for number in open_ones
            if given[number][-1].drop_reason is None
        ]
        rows = answers(f"turn{turn + 1}", encode(asked).kept if asked else [])
        for number in open_ones:
            failed = given[number][-1].drop_reason is not None
            given[number].append(NOT_ASKED if failed else _response(rows.get(str(number))))
    collector.ranks.barrier("predictions read")
    return [Prediction(record, tuple(turns)) for record, turns in zip(records, given, strict=True)]


def _response(row: Rollout | None) -> Response:
    if row is None:
        return TOO_LONG
    return Response(row.token_ids, row.response, row.finish_reason, row.drop_reason)


def _continued(
    record: Prompt, given: Sequence[Response], said: Sequence[str], *, prompt_id: str | None = None
) -> Prompt:
    """Return the conversation up to the next turn of the user."""
    turns = list(record.messages)
    for response, more in zip(given, said, strict=False):
        turns += [Message(role="assistant", content=response.text), Message(role="user", content=more)]
    return Prompt(
        record.id if prompt_id is None else prompt_id,
        user_text(turns),
        tuple(turns),
        metadata={name: value for name, value in record.metadata.items() if name == "tools"},
    )


def _warn_of_unanswered(predictions: Sequence[Prediction], format: PredictionFormat) -> None:
    reasons = Counter(
        next(response.drop_reason for response in prediction.responses if response.drop_reason is not None)
        for prediction in predictions
        if not prediction.answered
    )
    if reasons:
        counted = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        what = "their texts are empty" if format.keeps_unanswered else "they are left out"
        rank_zero_warn(
            f"{sum(reasons.values())} of {len(predictions)} records of data.predict_prompts have no answer "
            f"({counted}); {what}."
        )
