"""Schedules that learn from each probe, in whole runs: what they log, and that an interrupted run learns the same."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from support.runs import cli_arguments
from support.same_run import differences, rows

from sppo_lightning.__main__ import main
from sppo_lightning.store.iterations import IterationStore

PROMPTS = 16
SELECTION = "sppo_lightning.selection"
SCHEDULES: dict[str, dict[str, Any]] = {
    "DifficultyPools": {"hard": 0.3, "easy": 0.7, "hard_weight": 0.5, "easy_weight": 0.5},
    "SkipTied": {"explore": 0.1},
    "CategoryBandit": {"fraction": 0.75, "temperature": 0.01},
    "AdaptiveTarget": {
        "fraction": 0.75,
        "start": 2.0,
        "step": 5.0,
        "target_reward": 0.0,
        "column": "level",
    },
}


class KilledError(RuntimeError):
    """Stands for whatever ends a run."""


def coarse_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A reward that ties every other time: whether a response has an odd number of lower-case letters."""
    return [sum(letter.islower() for letter in text) % 2 for text in responses]


def prompt_file(folder: Path, **changes: Any) -> Path:
    records = [
        {"id": f"p{number}", "prompt": f"Count to {number}", "category": "xyz"[number % 3], "level": number}
        for number in range(PROMPTS)
    ]
    for record in records:
        record.update(changes)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arguments_of(policy: Path, prompts: Path, root: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "data__iterations": 3,
        "data__pairs_per_step": 2,
        "data__generator__max_new_tokens": 4,
        "data__selection": f"{SELECTION}.PerCategory",
        "data__selection__fraction": None,
        "data__selection__selection": json.dumps(
            {"class_path": f"{SELECTION}.Easiest", "init_args": {"fraction": 0.75}}
        ),
        "trainer__callbacks": json.dumps([{"class_path": "sppo_lightning.callbacks.DifficultyReestimation"}]),
    }
    return cli_arguments(policy, prompts, root, **{**settings, **changes})


def manifest(root: Path, iteration: int) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((root / f"iterations/{iteration:03d}/manifest.json").read_text()))


@pytest.mark.parametrize(
    "name",
    [
        "AdaptiveTarget",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("SkipTied", "DifficultyPools", "CategoryBandit")
        ),
    ],
)
def test_a_killed_run_learns_the_same(
    name: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in iteration 1, after the probe was observed and before its manifest says so."""
    reward = f"{__name__}.coarse_reward" if name == "SkipTied" else "support.runs.letter_reward"
    schedule = json.dumps({"class_path": f"{SELECTION}.{name}", "init_args": SCHEDULES[name]})
    root = tmp_path / "run"
    arguments = arguments_of(
        tiny_policy,
        prompt_file(tmp_path),
        root,
        data__schedule=schedule,
        data__reward__function=reward,
    )
    main(["fit", *arguments])
    whole = root.rename(tmp_path / "whole")

    states = [manifest(whole, number)["rule_states"]["schedule"] for number in range(3)]
    assert states[0] != states[1]
    found = [manifest(whole, number) for number in range(3)]
    assert [one["counts"]["prompts"] for one in found] == [PROMPTS] * 3
    skipped = [one["dropped"].get("not_scheduled", 0) for one in found]
    saved = [one["metrics"].get("iteration/rollouts_saved", 0) for one in found]
    assert saved == [2 * number for number in skipped]  # two responses a probe
    assert any(skipped[1:])
    for one in found:
        overlap = {
            key: value for key, value in one["metrics"].items() if key.startswith("iteration/overlap/")
        }
        assert set(overlap) == {
            f"iteration/overlap/{rule}"
            for rule in (
                "Easiest",
                "Hardest",
                "HighestRewardStd",
                "HighestRewardGap",
                "HighestPVar",
                "RandomFraction",
            )
        }
        assert all(0 <= share <= 1 for share in overlap.values())
        assert any(key.startswith("iteration/schedule/") for key in one["metrics"])

    original = IterationStore.write_pairs

    def write(store: IterationStore, *content: Any) -> None:
        if store.folder.name == "001":
            raise KilledError
        original(store, *content)

    with monkeypatch.context() as patch:
        patch.setattr(IterationStore, "write_pairs", write)
        with pytest.raises(KilledError):
            main(["fit", *arguments])
    main(["fit", *arguments])
    assert differences(whole, root) == []
    shutil.rmtree(root)


def test_quotas_in_a_run(tiny_policy: Path, tmp_path: Path) -> None:
    """Six, five and five prompts of a category; three quarters are 5, 4 and 4."""
    root = tmp_path / "run"
    main(["fit", *arguments_of(tiny_policy, prompt_file(tmp_path), root, data__iterations=1)])
    table = rows(root, "iterations/000/difficulty.parquet").popitem()[1]
    chosen = Counter(int(row["prompt_id"][1:]) % 3 for row in table if row["selected"])
    assert chosen == {0: 5, 1: 4, 2: 4}


def test_a_key_that_a_prompt_lacks_is_an_error_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy's folder does not exist."""
    prompts = prompt_file(tmp_path, category=None)
    with pytest.raises(SystemExit):
        main(["fit", *arguments_of(tmp_path / "none", prompts, tmp_path / "run")])
    assert (
        "data.selection: PerCategory reads 'category' of each prompt, but prompt 'p0' in data.prompts has none: add "
        "'category' to the file, name another key, or use another rule"
    ) in " ".join(capsys.readouterr().err.split())
