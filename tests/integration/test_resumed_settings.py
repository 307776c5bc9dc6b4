"""Which settings of a run may change before it is resumed or measured, through the real command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.runs import cli_arguments, letter_reward

from sppo_lightning.__main__ import main
from sppo_lightning.rewards import Reward
from sppo_lightning.types import Prompt

Arguments = Callable[..., list[str]]


class Counting(Reward):
    """A user's reward that counts, and remembers when it was made."""

    made = 0

    def __init__(self, bonus: float) -> None:
        Counting.made += 1
        self.bonus = bonus
        self.number = Counting.made
        self.started = time.time()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the letters' rewards, and a bonus."""
        self.number += 1
        return [self.bonus + reward for reward in letter_reward([], list(responses), [])]


@pytest.fixture(scope="module")
def arguments(
    tiny_policy: Path, counting_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Arguments:
    """A builder of the arguments of a run that is finished."""
    root = tmp_path_factory.mktemp("settings") / "run"

    def build(bonus: float = 1.0, **changes: Any) -> list[str]:
        settings = {
            "data__iterations": 1,
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "data__reward": json.dumps({"class_path": f"{__name__}.Counting", "init_args": {"bonus": bonus}}),
            "data__reward__function": None,
            "model__pair_forward": "sppo_lightning.pair_forward.AutoForward",
            "model__pair_forward__chunk": 64,
            **changes,
        }
        return cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)

    main(["fit", *build()])
    return build


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(args)
    return capsys.readouterr().err


def root_of(arguments: Arguments) -> Path:
    return Path(next(given for given in arguments() if "default_root_dir" in given).partition("=")[2])


def test_a_run_is_resumed_with_another_forward(arguments: Arguments) -> None:
    main(["fit", *arguments(model__pair_forward__chunk=32)])


def test_a_reward_that_counts_stays_the_same(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", *arguments(), f"--ckpt_path={root_of(arguments)}/checkpoints/last.ckpt"])
    assert "val/win_rate" in capsys.readouterr().out


def test_another_setting_of_it_is_refused(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    named = "data.reward.init_args.bonus=1.0, but this config has 2.0"
    assert named in refused(["fit", *arguments(bonus=2.0)], capsys)
    checkpoint = f"--ckpt_path={root_of(arguments)}/checkpoints/last.ckpt"
    assert "another data.generator or data.reward" in refused(
        ["validate", *arguments(bonus=2.0), checkpoint], capsys
    )
