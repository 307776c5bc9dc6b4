"""Prompts and responses of a run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.watch.texts import held_out_answers, held_out_prompts, prompts_of, responses_to


def test_prompts_from_the_most_difficult_on(finished: Path) -> None:
    rows = prompts_of(RunFolder(finished), 2)
    assert len(rows) == 10
    assert [row.difficulty for row in rows] == sorted(row.difficulty for row in rows)
    assert sum(row.selected for row in rows) == 8
    assert all(len(row.rewards) == (3 if row.selected else 2) for row in rows)
    assert rows[0].text is not None
    assert rows[0].text.startswith("Count to ")


def test_prompts_while_they_are_probed(finished: Path) -> None:
    store = RunFolder(finished).iteration(2)
    store.difficulty_path.unlink()
    rows = prompts_of(RunFolder(finished), 2)
    assert len(rows) == 10
    assert all(math.isnan(row.difficulty) and not row.selected for row in rows)


def test_responses_with_what_became_of_them(finished: Path) -> None:
    folder = RunFolder(finished)
    (first, *_) = folder.iteration(2).read_pairs()
    rows = responses_to(folder, 2, first.prompt_id)
    assert len(rows) == 3
    assert [row.reward for row in rows] == sorted((row.reward or 0.0 for row in rows), reverse=True)


def test_a_pruned_iteration_has_its_pairs(finished: Path) -> None:
    folder = RunFolder(finished)
    store = folder.iteration(0)
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    rows = prompts_of(folder, 0)
    assert len(rows) == 10
    assert {row.text for row in rows} == {None}
    pair = store.read_pairs()[0]
    found = responses_to(folder, 0, pair.prompt_id)
    assert [(row.mark, row.text) for row in found] == [("chosen", pair.chosen), ("rejected", pair.rejected)]


def test_held_out_answers_before_and_after(finished: Path) -> None:
    folder = RunFolder(finished)
    rows = held_out_prompts(folder, 3)
    gains = [row.after - row.before for row in rows if row.after is not None and row.before is not None]
    assert len(gains) == 4
    assert gains == sorted(gains, reverse=True)
    answers = held_out_answers(folder, 3, rows[0].prompt_id)
    assert [answer.mark for answer in answers] == [
        "initial policy",
        *(f"after {n} iteration(s)" for n in (1, 2, 3)),
    ]
    assert (answers[0].reward, answers[-1].reward) == (rows[0].before, rows[0].after)
