"""Prompts by config key, and those that are held out where none are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sppo_lightning.prompts import sets
from sppo_lightning.prompts.sets import PromptSets
from sppo_lightning.types import UserError


def prompt_sets(
    folder: Path, count: int, *, share: float = 0.1, seed: int = 1, named: bool = False
) -> PromptSets:
    """Two prompts of each text, under two ids; ids go from p0 up."""
    path = folder / "prompts.jsonl"
    records = [{"id": f"p{n}", "prompt": f"What is {n // 2}?"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    other = folder / "eval.jsonl"
    other.write_text(json.dumps({"id": "e", "prompt": "What else?"}) + "\n")
    sources: dict[str, str | list[str] | None] = {
        "prompts": str(path),
        "eval_prompts": str(other) if named else None,
        "test_prompts": None,
    }
    return PromptSets(sources, 99, eval_share=share, seed=seed)


def test_a_share_is_held_out_and_not_trained_on(tmp_path: Path) -> None:
    found = prompt_sets(tmp_path, 400)
    assert found.named("eval_prompts")
    train, held_out = set(found.read("prompts").ids), set(found.read("eval_prompts").ids)
    assert len(held_out) == 40
    assert train.isdisjoint(held_out)
    assert train | held_out == {f"p{n}" for n in range(400)}
    texts = [{prompt.text for prompt in found.read(key)} for key in ("prompts", "eval_prompts")]
    assert texts[0].isdisjoint(texts[1])  # the two ids of a text stay together
    assert not found.named("test_prompts")


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    held_out = [prompt_sets(tmp_path, 400, seed=seed).read("eval_prompts").ids for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_most_and_fewest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(prompt_sets(tmp_path, 3000).read("eval_prompts")) == sets.MOST_HELD_OUT == 200
    few = prompt_sets(tmp_path, 198)
    with caplog.at_level("INFO"):
        assert not few.named("eval_prompts")
    assert "198 prompts are too few to hold some out" in caplog.text
    assert len(few.read("prompts")) == 198
    with pytest.raises(UserError, match=r"data\.eval_prompts is not set: name a prompt file"):
        few.read("eval_prompts")


@pytest.mark.parametrize(("share", "named", "held_out"), [(0.0, False, 0), (0.0, True, 1)])
def test_none_are_held_out_where_that_is_not_wanted(
    tmp_path: Path, share: float, named: bool, held_out: int
) -> None:
    found = prompt_sets(tmp_path, 400, share=share, named=named)
    assert len(found.read("prompts")) == 400
    assert found.named("eval_prompts") is named
    if named:
        assert len(found.read("eval_prompts")) == held_out
