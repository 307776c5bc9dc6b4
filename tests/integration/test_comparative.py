"""Whole runs with a reward that compares a prompt's responses with each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.store.shards import read_rollouts

CHANGES: dict[str, Any] = {
    "data__reward": "sppo_lightning.rewards.PairwiseReward",
    "data__reward__function": None,
    "data__reward__judge": "sppo_lightning.rewards.FunctionJudge",
    "data__reward__judge__init_args__function": "integration.test_comparative.later_letter",
    "data__selection": "sppo_lightning.selection.All",
    "data__selection__fraction": None,
    "data__probe_samples": 3,
    "trainer__logger": None,
    "model__learning_rate": 2e-2,
}


def later_letter(prompt: str, first: str, second: str) -> float:
    """P(first beats second): the share of its characters after "m" decides."""
    scores = [sum(character > "m" for character in text) / (len(text) + 1) for text in (first, second)]
    return 0.5 + (scores[0] - scores[1]) / 2


def test_win_probabilities_make_pairs_and_held_out_answers_meet_the_initial_ones(
    tiny_policy: Path, write_prompts: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {**CHANGES, "data__eval_prompts": write_prompts("eval.jsonl", 4, start=50)}
    main(["fit", *cli_arguments(tiny_policy, write_prompts(), run, **changes)])
    for number in range(2):
        rows = [
            row
            for path in (run / f"iterations/{number:03d}/rollouts").iterdir()
            for row in read_rollouts(path)
        ]
        for prompt_id in {row.prompt_id for row in rows}:
            rewards = [row.reward for row in rows if row.prompt_id == prompt_id]
            assert len(rewards) == 3
            assert sum(reward or 0 for reward in rewards) == pytest.approx(1.5)
        manifest = json.loads((run / f"iterations/{number:03d}/manifest.json").read_text())
        assert manifest["metrics"]["iteration/reward/mean"] == pytest.approx(0.5)
        assert manifest["reward"]["init_args"]["judge"]["init_args"]["function"].endswith("later_letter")
    initial, after = (read_rollouts(run / f"evaluations/00{number}/rollouts.parquet") for number in (0, 2))
    assert [row.reward for row in initial] == [0.5] * 4
    assert [row.reward for row in after] == pytest.approx(
        [later_letter("", new.response, old.response) for new, old in zip(after, initial, strict=True)]
    )
    assert any(row.reward != 0.5 for row in after)
    with (run / "metrics.csv").open() as file:
        rates = [row["val/win_rate"] for row in csv.DictReader(file) if row["val/win_rate"]]
    wins = [1.0 if (row.reward or 0) > 0.5 else 0.5 if row.reward == 0.5 else 0.0 for row in after]
    assert float(rates[-1]) == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__probe_samples": 2},
            "data.reward PairwiseReward compares a prompt's responses with each other, so that all have to be there at "
            "once: set data.probe_samples=3",
        ),
        (
            {"data__selection": "sppo_lightning.selection.Easiest", "data__selection__fraction": 0.5},
            "every prompt has the same mean reward and data.selection Easiest has nothing to choose by",
        ),
        (
            {
                "data__pair_selection": "sppo_lightning.selection.Hardest",
                "data__pair_selection__fraction": 0.9,
            },
            "every prompt has the same mean reward and data.pair_selection Hardest has nothing to choose by",
        ),
        (
            {"data__curriculum": "sppo_lightning.selection.EasyToHard"},
            "every prompt has the same mean reward and data.curriculum EasyToHard has nothing to order by",
        ),
        (
            {
                "trainer__callbacks": "sppo_lightning.callbacks.DifficultyReestimation",
                "trainer__callbacks__samples": 2,
            },
            "DifficultyReestimation.samples=2: data.reward PairwiseReward compares a prompt's responses with each "
            "other, so that all 3 have to be there at once",
        ),
    ],
    ids=["probe", "selection", "pair selection", "curriculum", "reestimation"],
)
def test_what_a_comparison_cannot_give_is_refused(
    changes: dict[str, Any],
    message: str,
    tiny_policy: Path,
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["fit", *cli_arguments(tiny_policy, write_prompts(), run, **{**CHANGES, **changes})])
    assert message in capsys.readouterr().err
    assert not (run / "iterations").exists()
