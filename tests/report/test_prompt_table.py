"""The table's rows and the blocks of texts that they point to."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import MadeRun

from sppo_lightning.report.prompt_table import PromptTable, short
from sppo_lightning.report.run_data import read_run
from sppo_lightning.report.text_chunks import CHUNK, TextChunks
from sppo_lightning.store.pairs import PairTable


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run").write()


def table_of(made: MadeRun, budget: int = 10**6) -> tuple[PromptTable, dict[str, Any], list[dict[str, Any]]]:
    chunks = TextChunks(budget)
    table = PromptTable([read_run(made.root)], chunks, {"p2": "maths"})
    return table, table.content(), [unpacked(block) for block in chunks.blocks]


def test_rows_lead_to_their_responses(made: MadeRun) -> None:
    _, content, blocks = table_of(made)
    assert len(content["prompt"]) == 24
    assert content["iteration"] == [1] * 12 + [0] * 12  # the newest first
    row = next(
        place
        for place, prompt in enumerate(content["prompt"])
        if content["ids"][prompt] == "p2" and content["iteration"][place] == 0
    )
    number = content["prompt"][row]
    assert content["prompts"][number] == "say p2"
    assert content["categories"][number] == "maths"
    assert content["outcomes"][content["outcome"][row]] == "paired"
    parts = [blocks[block][f"t0.0.{number}"] for block in content["blocks"][row]]
    answers = [answer for part in parts for answer in part["answers"]]
    assert [answer["sample"] for answer in answers] == [0, 1, 2, 3]
    assert answers[3]["text"] == "answer 3 to say p2 in iteration 0"
    assert answers[3]["finish"] == "length"
    assert answers[3]["parts"] == {"style": 0.25}
    assert parts[0]["pairs"] == [{"chosen": 3, "rejected": 0, "chosen_logp": -8.0, "rejected_logp": -4.0}]


def test_held_out_answers_have_their_own_prompts(made: MadeRun) -> None:
    _, content, blocks = table_of(made)
    (evaluations,) = content["held_out"]
    assert [one["finished"] for one in evaluations] == [0, 1, 2]
    one = evaluations[1]
    number, block = one["prompt"][2], one["block"][2]
    assert content["ids"][number] == "e2"
    assert one["reward"][2] == 0.5
    assert blocks[block][f"e0.1.{number}"]["text"] == "answer 0 to say held out 2 in iteration 1"
    assert blocks[block][f"e0.1.{number}"]["logp"] == -3.0


def test_the_gain_is_that_over_the_first_iteration(made: MadeRun) -> None:
    _, content, _ = table_of(made)
    gains = dict(zip(zip(content["iteration"], content["prompt"], strict=True), content["gain"], strict=True))
    assert {value for (iteration, _), value in gains.items() if iteration == 0} == {0.0}
    assert {value for (iteration, _), value in gains.items() if iteration == 1} == {0.1}


def test_pruned_iterations_keep_their_pairs_texts(made: MadeRun) -> None:
    store = made.folder.iteration(0)
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    *_, blocks = table_of(made)
    texts = [value for block in blocks for key, value in block.items() if key.startswith("t0.0.")]
    assert len(texts) == 3
    assert [answer["text"] for answer in texts[0]["answers"]] == [
        "answer 3 to say p2 in iteration 0",
        "answer 0 to say p2 in iteration 0",
    ]
    assert (texts[0]["pairs"][0]["chosen"], texts[0]["pairs"][0]["rejected"]) == (0, 1)


def test_several_pairs_of_a_prompt_in_a_pruned_iteration(made: MadeRun) -> None:
    store = made.folder.iteration(0)
    first = made.pair(2, 0)
    second = replace(first, chosen="the second", reference_chosen_logp=-6.0)
    store.write_pairs(PairTable.collect([first, made.pair(6, 0), second]))
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    _, content, blocks = table_of(made)
    number = content["ids"].index("p2")
    (found,) = [block[key] for block in blocks for key in block if key == f"t0.0.{number}"]
    assert [(one["sample"], one["text"]) for one in found["answers"]] == [
        (0, "answer 3 to say p2 in iteration 0"),
        (1, "answer 0 to say p2 in iteration 0"),
        (2, "the second"),
        (3, "answer 0 to say p2 in iteration 0"),
    ]
    marks = [(one["chosen"], one["rejected"], one["chosen_logp"]) for one in found["pairs"]]
    assert marks == [(0, 1, -8.0), (2, 3, -6.0)]
    places = [
        each
        for row, each in enumerate(content["blocks"])
        if (content["iteration"][row], content["prompt"][row]) == (0, number)
    ]
    assert [len(each) for each in places] == [1]


def test_what_is_over_the_budget_is_left_out_oldest_first(made: MadeRun) -> None:
    table, content, _ = table_of(made, budget=0)
    assert table.left_out == ["run: responses of iteration 1", "run: responses of iteration 0"]
    assert content["blocks"] == [[]] * 24
    assert len(content["prompt"]) == 24


def test_a_shard_that_is_damaged_later_is_noted(made: MadeRun) -> None:
    run = read_run(made.root)
    made.folder.iteration(0).shards.path("probe", 0).write_bytes(b"")
    PromptTable([run], TextChunks(10**6), {})
    assert len(run.reader.missing) == 1


def test_long_prompts_lie_in_a_block(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", text=lambda name: f"{name} " + "x" * 1000).write()
    _, content, blocks = table_of(made)
    number = content["prompt"][0]
    assert len(content["prompts"][number]) == 240
    assert len(blocks[content["prompt_blocks"][number]][f"p{number}"]) > 1000


def test_blocks_end_when_they_are_large() -> None:
    chunks = TextChunks(10**6)
    places = [chunks.add(str(number), {"text": "x" * (CHUNK // 2)}) for number in range(5)]
    chunks.flush()
    assert places == [0, 0, 1, 1, 2]
    assert [sorted(unpacked(block)) for block in chunks.blocks] == [["0", "1"], ["2", "3"], ["4"]]


def test_a_key_that_comes_twice_lies_in_two_blocks() -> None:
    chunks = TextChunks(10**6)
    assert [chunks.add("a", "first"), chunks.add("a", "second")] == [0, 1]


def test_numbers_have_five_digits() -> None:
    assert [short(value) for value in (1 / 3, 123456.789, None, float("nan"), 7)] == [
        0.33333,
        123460.0,
        None,
        None,
        7,
    ]
