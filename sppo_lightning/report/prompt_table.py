"""The prompts of some runs as columns of a table, and their responses as blocks of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sppo_lightning.report.prompt_rows import PromptRow, mean
from sppo_lightning.report.run_data import Evaluation, Iteration, RunData
from sppo_lightning.report.text_chunks import TextChunks
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.rows import TokenColumn, parts_of
from sppo_lightning.store.shards import ROLLOUT_SCHEMA
from sppo_lightning.store.tables import read_table
from sppo_lightning.types import Rollout

MOST_ROWS = 200_000
BEGINNING = 240  # characters of a prompt that the table holds; all of it lies with its responses
NUMBERS = ("difficulty", "reward", "spread", "responses", "length", "gap")


class PromptTable:
    """Prompts of some runs: rows of numbers for the table, and where each one's texts lie.

    Args:
        runs: in order.
        chunks: takes the texts.
        categories: by prompt id.
    """

    def __init__(self, runs: Sequence[RunData], chunks: TextChunks, categories: Mapping[str, str]) -> None:
        self.chunks = chunks
        self.categories = categories
        self.left_out: list[str] = []
        self._numbers: dict[tuple[str, str], int] = {}  # by set of prompts and id: two sets may share ids
        self._beginnings: list[str] = []
        self._prompt_blocks: dict[int, int] = {}  # where longer texts lie, by prompt
        self._gains: dict[tuple[int, int, str], float] = {}
        self._places: dict[tuple[int, int, int], list[int]] = {}
        self._held_out = [
            [self._answers(place, one) for one in run.evaluations] for place, run in enumerate(runs)
        ]
        self._rows: list[tuple[int, int, int, PromptRow, float]] = []
        newest = sorted(
            ((one.number, place, one) for place, run in enumerate(runs) for one in run.iterations),
            key=lambda item: (-item[0], item[1]),
        )
        first = [_first_means(run) for run in runs]
        for _, place, iteration in newest:
            self._add(runs[place], place, iteration, first[place])
        self.chunks.flush()

    def content(self) -> dict[str, Any]:
        """Return the table: prompts by number, and columns of rows, in JSON types."""
        rows = self._rows
        ids = [prompt_id for _, prompt_id in self._numbers]
        reasons = list(dict.fromkeys(row.outcome for *_, row, _ in rows))
        code = {reason: number for number, reason in enumerate(reasons)}
        return {
            "ids": ids,
            "prompts": self._beginnings,
            "prompt_blocks": self._prompt_blocks,
            "categories": [self.categories.get(prompt_id) for prompt_id in ids] if self.categories else None,
            "outcomes": reasons,
            "run": [run for run, *_ in rows],
            "iteration": [iteration for _, iteration, *_ in rows],
            "prompt": [prompt for *_, prompt, _, _ in rows],
            "outcome": [code[row.outcome] for *_, row, _ in rows],
            **{name: [short(getattr(row, name)) for *_, row, _ in rows] for name in NUMBERS},
            "gain": [short(gain) for *_, gain in rows],
            "blocks": [self._places.get((run, iteration, prompt), []) for run, iteration, prompt, *_ in rows],
            "held_out": self._held_out,
        }

    def _prompt(self, kind: str, prompt_id: str, text: str) -> int:
        """Return a prompt's number, and keep its text once it is known."""
        number = self._numbers.setdefault((kind, prompt_id), len(self._numbers))
        if number == len(self._beginnings):
            self._beginnings.append("")
        if text and not self._beginnings[number]:
            self._beginnings[number] = text[:BEGINNING]
            if len(text) > BEGINNING and (block := self.chunks.add(f"p{number}", text)) is not None:
                self._prompt_blocks[number] = block
        return number

    def _answers(self, run: int, evaluation: Evaluation) -> dict[str, Any]:
        """Return an evaluation's answers in columns; their texts go into blocks."""
        columns: dict[str, list[Any]] = {"prompt": [], "reward": [], "length": [], "block": []}
        for row in evaluation.rows:
            number = self._prompt("held out", row.prompt_id, row.prompt)
            columns["prompt"].append(number)
            columns["reward"].append(short(row.reward))
            columns["length"].append(row.length)
            logp = evaluation.logps.get(row.prompt_id)
            answer = _response(row, logp)
            columns["block"].append(self.chunks.add(f"e{run}.{evaluation.finished}.{number}", answer))
        return {"finished": evaluation.finished, **columns}

    def _add(self, run: RunData, place: int, iteration: Iteration, first: Mapping[str, float]) -> None:
        """Add an iteration's prompts, and as many of its texts as there is room for."""
        if len(self._rows) + len(iteration.rows) > MOST_ROWS:
            self.left_out.append(f"{run.name}: the prompts of iteration {iteration.number}")
            return
        for row in iteration.rows:
            samples = iteration.samples.get(row.prompt_id)
            gain = mean(samples.fair) - first.get(row.prompt_id, math.nan) if samples else math.nan
            number = self._prompt("trained on", row.prompt_id, "")
            self._rows.append((place, iteration.number, number, row, gain))
        for prompt_id, prompt, content in _texts(run, iteration):
            number = self._prompt("trained on", prompt_id, prompt)
            block = self.chunks.add(f"t{place}.{iteration.number}.{number}", content)
            if block is None:
                self.left_out.append(f"{run.name}: responses of iteration {iteration.number}")
                return
            self._places.setdefault((place, iteration.number, number), []).append(block)


def _first_means(run: RunData) -> dict[str, float]:
    """Return each prompt's mean reward where it was first sampled, by prompt id."""
    found: dict[str, float] = {}
    for iteration in run.iterations:
        for prompt_id, samples in iteration.samples.items():
            if samples.fair:
                found.setdefault(prompt_id, mean(samples.fair))
    return found


def _texts(run: RunData, iteration: Iteration) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield an iteration's prompts, id and text, with their responses and pairs, shard by shard.

    Where the responses are gone, those of the pairs. What cannot be read has been noted when its numbers were read.
    """
    reader = run.reader
    store = reader.folder.iteration(iteration.number)
    pairs: PairTable | None = None
    if store.pairs_path.exists():
        pairs = reader.read(store.pairs_path, store.read_pairs, lacks="Chosen and rejected are not marked.")
    marks = _marks(pairs) if pairs is not None else {}
    for path in store.shards.paths():
        shard = reader.read(path, partial(_shard, path), lacks="Its responses are missing.")
        for prompt_id, prompt, responses in shard or ():
            yield prompt_id, prompt, {"answers": responses, "pairs": marks.get(prompt_id, [])}
    if not iteration.samples and pairs is not None:
        for prompt_id, content in _paired(pairs, marks).items():
            yield prompt_id, "", content


def _paired(pairs: PairTable, marks: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the responses of the pairs, and the pairs by their places among them, by prompt id."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        content = found.setdefault(pair.prompt_id, {"answers": [], "pairs": []})
        answers, first = content["answers"], len(content["answers"])
        sides = (
            (pair.chosen, pair.chosen_reward, pair.chosen_token_ids),
            (pair.rejected, pair.rejected_reward, pair.rejected_token_ids),
        )
        for number, (text, reward, tokens) in enumerate(sides, first):
            answers.append({"sample": number, "text": text, "reward": short(reward), "length": len(tokens)})
        mark = marks[pair.prompt_id][len(content["pairs"])]
        content["pairs"].append({**mark, "chosen": first, "rejected": first + 1})
    return found


def _marks(pairs: PairTable) -> dict[str, list[dict[str, Any]]]:
    """Return the pairs of each prompt, by the sample indices of chosen and rejected."""
    names = {
        "chosen": "chosen_sample_index",
        "rejected": "rejected_sample_index",
        "chosen_logp": "reference_chosen_logp",
        "rejected_logp": "reference_rejected_logp",
        "chosen_win": "chosen_win_probability",
        "rejected_win": "rejected_win_probability",
    }
    found: dict[str, list[dict[str, Any]]] = {}
    columns = [pairs.table[name].to_pylist() for name in names.values()]
    for prompt_id, *values in zip(pairs.prompt_ids, *columns, strict=True):
        numbers = {name: short(value) for name, value in zip(names, values, strict=True)}
        found.setdefault(prompt_id, []).append(
            {name: value for name, value in numbers.items() if value is not None}
        )
    return found


def _shard(path: Path) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return a shard's prompts: id, text, responses."""
    table: pa.Table = read_table(path, ROLLOUT_SCHEMA)
    lengths = TokenColumn(table["token_ids"]).lengths
    names = ("prompt_id", "prompt", "sample_index", "response", "finish_reason", "reward", "drop_reason")
    columns = (table[name].to_pylist() for name in names)
    found: list[tuple[str, str, list[dict[str, Any]]]] = []
    for (prompt_id, prompt, index, text, finish, reward, drop), parts, length in zip(
        zip(*columns, strict=True), parts_of(table), lengths, strict=True
    ):
        if not found or found[-1][0] != prompt_id:
            found.append((prompt_id, prompt, []))
        found[-1][2].append(_answer(index, text, length, finish, reward, parts, drop))
    return found


def _response(row: Rollout, logp: float | None) -> dict[str, Any]:
    answer = _answer(
        row.sample_index,
        row.response,
        row.length,
        row.finish_reason,
        row.reward,
        row.reward_parts,
        row.drop_reason,
    )
    return answer if logp is None else {**answer, "logp": short(logp)}


def _answer(
    index: int,
    text: str,
    length: int,
    finish: str,
    reward: float | None,
    parts: Mapping[str, float],
    drop: str | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {"sample": index, "text": text, "length": length, "finish": finish}
    found["reward"] = short(reward)
    if parts:
        found["parts"] = {name: short(value) for name, value in parts.items()}
    if drop is not None:
        found["drop"] = drop
    return found


def short(value: float | None) -> float | None:
    """Return a number with the digits that a person compares; ``None`` for one that is not known."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")
