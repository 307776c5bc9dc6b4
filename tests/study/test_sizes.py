"""Arms with fewer prompts than an optimizer step has pairs are refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.study.sizes import check_pairs
from sppo_lightning.types import UserError

WritePrompts = Callable[..., Path]


def arm(prompts: object, selection: Any, **changes: Any) -> PlannedRun:
    data = {
        **{"prompts": prompts, "selection": selection, "iterations": 2, "samples_per_prompt": 4},
        **{
            "probe_samples": None,
            "pairs_per_step": 4,
            "batch_size": 4,
            "generator": "HFGenerator",
            **changes,
        },
    }
    return PlannedRun("base", 1, "few", {"data": data}, Path("x"))


def rule(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"sppo_lightning.selection.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        (rule("Easiest", fraction=0.2), 2),
        (rule("Hardest", fraction=[0.9, 0.3]), 3),
        (rule("Band", low=0.0, high=0.3), 3),
        (rule("DropHardest", fraction=0.7), 3),
        ({"class_path": "RandomFraction", "init_args": {"fraction": 0.1}}, 1),
    ],
)
def test_a_share_that_leaves_too_few(write_prompts: WritePrompts, selection: Any, kept: int) -> None:
    prompts = str(write_prompts(count=10))
    with pytest.raises(UserError) as error:
        check_pairs([arm(prompts, rule("All")), arm(prompts, selection)])
    assert f"arm few in setting base: data.selection keeps {kept} of 10 candidate prompts" in str(error.value)
    assert "\n" not in str(error.value)


def test_shares_that_leave_enough(write_prompts: WritePrompts) -> None:
    prompts = str(write_prompts(count=10))
    for selection in ("All", rule("Easiest", fraction=0.4), rule("RewardBand", target=0.5, width=0.1)):
        check_pairs([arm(prompts, selection)])


def test_a_prompt_that_gives_several_pairs_counts_for_them(write_prompts: WritePrompts) -> None:
    pairs = {"class_path": "sppo_lightning.pairing.TopPairs", "init_args": {"most_pairs": 3}}
    check_pairs([arm(str(write_prompts(count=10)), rule("Easiest", fraction=0.2), pairing=pairs)])


def test_a_schedule_leaves_fewer_candidates(write_prompts: WritePrompts) -> None:
    schedule = rule("RandomSubset", fraction=0.5)
    with pytest.raises(UserError, match="keeps 2 of 5 candidate prompts"):
        check_pairs([arm(str(write_prompts(count=10)), rule("Easiest", fraction=0.4), schedule=schedule)])


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arm few in setting base: data.prompts=.*no such file"):
        check_pairs([arm(str(tmp_path / "nowhere.jsonl"), rule("All"))])


def test_rules_that_cannot_be_made_are_left_to_the_run(write_prompts: WritePrompts) -> None:
    prompts = str(write_prompts(count=10))
    check_pairs([arm(prompts, rule("Nowhere")), arm(prompts, rule("Easiest", fraction=2)), arm(None, "All")])
