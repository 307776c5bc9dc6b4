"""Where answers come from: a run's held-out answers, or a file in any of the formats that judges read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sppo_lightning.evaluation.gate import best_finished, read_decisions
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.judging.contract import Answer, AnswerSet
from sppo_lightning.prompts.formats import file_records
from sppo_lightning.prompts.reading import check_encodable
from sppo_lightning.prompts.shapes import names_of
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.run_settings import read_settings
from sppo_lightning.types import Message, Prompt, UserError

Iteration = int | Literal["initial", "last", "best"]

PROMPTS = ("instruction", "prompt", "question")  # fields that hold what was asked, in this order
ANSWERS = ("output", "response", "completion", "answer")  # fields that hold what was answered
IDS = ("id", "uid", "prompt_id", "question_id")
NAMES = ("generator", "model")


def read_answers(source: str, *, iteration: Iteration, key: str) -> AnswerSet:
    """Read answers.

    Args:
        source: folder of a run, or a file: a list or lines of records with a prompt (``instruction``, ``prompt`` or
            ``question``) and an answer (``output``, ``response``, ``completion`` or ``answer``), or with ``messages``
            that end with the answer, as Arena-Hard's do.
        iteration: of a run: self-play iteration whose policy answered, from 0; ``initial``: the policy that the run
            started from; ``last``: the one that it has now; ``best``: the one with the best held-out reward.
        key: of the command line, for errors.

    Raises:
        UserError: if there are none.
    """
    path = Path(source)
    if path.is_dir():
        return _run_answers(path, source, iteration)
    if not path.exists():
        raise UserError(
            f"{key} {source}: there is no such folder or file; give a run's folder, or a file of answers"
        )
    if iteration != "last":
        raise UserError(
            f"{key} {source} is a file, which has no iterations: name a run, or leave the iteration out"
        )
    return _file_answers(path, source, key)


# ---------------------------------------------------------------------------- runs


def _run_answers(root: Path, source: str, iteration: Iteration) -> AnswerSet:
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise UserError(
            f"{source!r} is no run: it has no config.yaml; give a folder that was a fit's trainer.default_root_dir, or "
            "a file of answers"
        )
    settings = read_settings(folder)
    evaluated = sorted(
        int(path.parent.name)
        for path in folder.evaluations.glob("*/rollouts.parquet")
        if re.fullmatch("[0-9]+", path.parent.name)
    )
    if not evaluated:
        raise UserError(
            f"{source} has no held-out answers: run fit with data.eval_prompts, or give a file of answers"
        )
    finished = _finished(folder, iteration, evaluated, source)
    rows = load_evaluation(folder.evaluation(f"{finished:03d}")) if finished in evaluated else None
    if rows is None:
        there = ", ".join("initial" if number == 0 else str(number - 1) for number in evaluated)
        raise UserError(
            f"{source} has no held-out answers of iteration {iteration}, only of {there}: name one of those"
        )
    name = root.resolve().name
    return AnswerSet(
        name=f"{name} ({_policy(finished)})",
        source=source,
        answers=[
            Answer(
                Prompt(row.prompt_id, row.prompt, (Message(role="user", content=row.prompt),)),
                row.response,
                math.nan if row.reward is None else row.reward,
            )
            for row in rows
        ],
        run=folder,
        settings=settings,
    )


def _policy(finished: int) -> str:
    return "initial policy" if finished == 0 else f"after {finished} iteration{'s' if finished > 1 else ''}"


def _finished(folder: RunFolder, iteration: Iteration, evaluated: Sequence[int], source: str) -> int:
    """Return the iterations that the policy was trained for."""
    if iteration == "initial":
        return 0
    if iteration == "last":
        decided = read_decisions(folder)
        return decided[-1].policy if decided else evaluated[-1]
    if iteration == "best":
        best = best_finished(folder, evaluated[-1])
        if best is None:
            raise UserError(
                f"{source} has no held-out answers of its initial policy, so that no policy is the best"
            )
        return best
    return iteration + 1


# --------------------------------------------------------------------------- files


def _file_answers(path: Path, source: str, key: str) -> AnswerSet:
    answers: list[Answer] = []
    names: set[str] = set()
    for where, fields in file_records(path, key):
        answers.append(_answer(fields, where))
        names |= {str(fields[name]) for name in NAMES if isinstance(fields.get(name), str)}
    if not answers:
        raise UserError(f"{key} {source} holds no answers")
    return AnswerSet(name=names.pop() if len(names) == 1 else path.stem, source=source, answers=answers)


def _answer(fields: Mapping[str, Any], where: str) -> Answer:
    """Return a record's prompt and answer."""
    found = _from_messages(fields) or _from_fields(fields)
    if found is None:
        raise UserError(
            f"{where}: no answer is recognised; its fields are: {names_of(fields)}. Wanted: {' or '.join(PROMPTS)} "
            f"with {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}, or messages that end with the assistant's"
        )
    turns, text = found
    for said in (text, *(turn["content"] for turn in turns)):
        check_encodable(said, where)
    said = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
    own_id = next((str(fields[name]) for name in IDS if isinstance(fields.get(name), str | int)), said)
    dataset = {"dataset": fields["dataset"]} if isinstance(fields.get("dataset"), str) else {}
    return Answer(Prompt(own_id, said, turns, metadata=dataset), text)


def _from_fields(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], str] | None:
    asked = next((fields[name] for name in PROMPTS if isinstance(fields.get(name), str)), None)
    said = next((fields[name] for name in ANSWERS if isinstance(fields.get(name), str)), None)
    if asked is None or said is None:
        return None
    return (Message(role="user", content=asked),), said


def _from_messages(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], str] | None:
    """Read a conversation, whose answer is a text, or ``{"answer": text}`` as in Arena-Hard's files."""
    turns = fields.get("messages")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        return None
    *before, last = turns
    content = last.get("content")
    text = content.get("answer") if isinstance(content, dict) else content
    known = all(isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in before)
    if not known or not isinstance(text, str) or last.get("role") != "assistant":
        return None
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in before), text


# ------------------------------------------------------------------------- matching


def matched(judged: AnswerSet, others: AnswerSet) -> Iterator[tuple[Answer, Answer | None]]:
    """Yield each answer of ``others``, in order, with the one of ``judged`` to the same prompt, if there is one.

    Prompts are the same by their exact text. Where a set has several answers to one text, by their ids too.

    Raises:
        UserError: if no prompt is in both, or a prompt has several answers.
    """
    by_text = _by_text(judged)
    wanted = _by_text(others)
    if not by_text.keys() & wanted.keys():
        raise UserError(
            f"no prompt of {others.source} is in {judged.source}, so that there is nothing to compare: prompts are "
            "matched by their exact text"
        )
    for answer in others.answers:
        same = by_text.get(answer.prompt.text, {})
        if len(same) > 1 or len(wanted[answer.prompt.text]) > 1:
            yield answer, same.get(answer.prompt.id)
        else:
            yield answer, next(iter(same.values()), None)


def _by_text(answers: AnswerSet) -> dict[str, dict[str, Answer]]:
    found: dict[str, dict[str, Answer]] = {}
    for answer in answers.answers:
        same = found.setdefault(answer.prompt.text, {})
        if same.setdefault(answer.prompt.id, answer).text != answer.text:
            raise UserError(
                f"{answers.source} has two different answers to the prompt {answer.prompt.text[:80]!r}: leave one out, "
                "or give each record an 'id'"
            )
    return found
