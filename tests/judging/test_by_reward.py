"""Comparing by a run's reward, stored or computed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.judges import write_answers, write_run

from sppo_lightning.judging import RewardAnnotator
from sppo_lightning.judging.answers import matched, read_answers
from sppo_lightning.judging.comparing import Pair, compare
from sppo_lightning.types import UserError

scored: list[list[str]] = []


def counting(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    scored.append(list(responses))
    return [float(len(text)) if "?" not in text else math.nan for text in responses]


@pytest.fixture(autouse=True)
def nothing_scored() -> None:
    scored.clear()


def preferences(judged: Path, others: Path, *, iteration: Any = "last") -> list[float]:
    annotator = RewardAnnotator()
    first = read_answers(str(judged), iteration="last", key="answers")
    second = read_answers(str(others), iteration=iteration, key="--against")
    first, second = annotator.prepare(first, second)
    pairs = [Pair(own.prompt, own, other) for other, own in matched(first, second) if own]
    return [pair.preference for pair in compare(annotator, pairs, None)]


def run_of(root: Path, *answers: Sequence[str], **options: Any) -> Path:
    return write_run(root, answers, **{"reward": f"{__name__}.counting", **options})


def test_stored_rewards_are_compared_as_they_are(tmp_path: Path) -> None:
    stored = [[1.0, 2.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0]]
    run = run_of(tmp_path / "mine", ["a", "bb", "cc", "?"], ["aa", "b", "ee", "?"], rewards=stored)
    assert preferences(run, run, iteration="initial") == [1.0, 0.0, 0.5, 0.5]
    again = run_of(tmp_path / "other", ["a", "bb", "cc", "d"], rewards=[[9.0, 9.0, 9.0, None]])
    found = preferences(run, again)
    assert found[:3] == [0.0, 0.0, 0.0]
    assert math.isnan(found[3])
    assert scored == []


def test_answers_of_a_file_are_scored_by_the_runs_own_reward(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", ["aa", "b", "ee", "f"], rewards=[[2.0, 1.0, 2.0, 1.0]])
    file = write_answers(tmp_path / "reference.json", ["a", "bbb", "ee ", "?"])
    found = preferences(run, file)
    assert found[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(found[3])
    assert scored == [["a", "bbb", "ee ", "?"]]
    assert preferences(file, run)[:3] == [0.0, 1.0, 1.0], "also where the file is the one that is judged"


def test_another_reward_has_other_rewards(tmp_path: Path) -> None:
    """Stored rewards of the second run would say that it wins."""
    run = run_of(tmp_path / "mine", ["aa", "b"], rewards=[[2.0, 1.0]])
    other = write_run(tmp_path / "other", [["a", "b "]], rewards=[[50.0, 0.0]])
    assert preferences(run, other) == [1.0, 0.0]
    assert scored == [["a", "b "]]


def reads_answers(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(response == row["gold"]) for response, row in zip(responses, metadata, strict=True)]


def test_the_reward_reads_what_the_runs_prompt_file_has(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", ["a", "b"], reward=f"{__name__}.reads_answers", rewards=[[1.0, 0.0]])
    prompts = tmp_path / "mine-prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"Question {n}?", "gold": gold} for n, gold in enumerate("ac")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preferences(run, write_answers(tmp_path / "reference.json", ["x", "c"])) == [1.0, 0.0]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    file, other = (write_answers(tmp_path / f"{name}.json", ["a"]) for name in ("one", "two"))
    with pytest.raises(
        UserError, match=r"neither .*one\.json nor .*two\.json is a run, so that there is no reward"
    ):
        preferences(file, other)
    run = run_of(tmp_path / "gone", ["b"], reward="gone.module")
    with pytest.raises(
        UserError, match=r"data\.reward of .* cannot be loaded .*: give the command in the folder"
    ):
        preferences(run, file)
    config = tmp_path / "gone/config.yaml"
    config.write_text(config.read_text().replace("gone.module", "(secret, not stored)"))
    with pytest.raises(
        UserError, match=r"^data\.reward\.init_args\.function is masked in the config\.yaml of"
    ):
        preferences(run, file)
    config.write_text("data: {}\n")
    with pytest.raises(UserError, match=r"names no data\.reward: restore it"):
        preferences(run, file)


def judge(prompt: str, first: str, second: str) -> float:
    return 0.5


def test_a_reward_that_compares_has_no_reward_of_one_answer(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", ["b"])
    config = json.loads((run / "config.yaml").read_text())
    judged = {
        "class_path": "sppo_lightning.rewards.FunctionJudge",
        "init_args": {"function": f"{__name__}.judge"},
    }
    config["data"]["reward"] = {
        "class_path": "sppo_lightning.rewards.PairwiseReward",
        "init_args": {"judge": judged},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"compares a prompt's responses with each other.*: use --by judge"):
        preferences(run, write_answers(tmp_path / "reference.json", ["a"]))


def test_comparisons_with_other_initial_answers_are_refused(tmp_path: Path) -> None:
    mine, same, other = (
        run_of(tmp_path / name, [first], ["bb"], rewards=[[0.5], [0.75]])
        for name, first in (("mine", "a"), ("same", "a"), ("other", "c"))
    )
    for run in (mine, same, other):
        config = json.loads((run / "config.yaml").read_text())
        config["data"]["reward"] = {"class_path": "sppo_lightning.rewards.WinProbabilityReward"}
        (run / "config.yaml").write_text(json.dumps(config))
    assert preferences(mine, same) == [0.5]
    with pytest.raises(UserError, match=r"own initial policy, whose answers differ: use --by judge"):
        preferences(mine, other)
