"""The package's losses by ``class_path``, in whole runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.losses import CONFIGS, LOSSES, config
from support.runs import cli_arguments, letter_reward

from sppo_lightning.__main__ import main
from sppo_lightning.rewards import Reward, Scores
from sppo_lightning.types import Prompt

WritePrompts = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore")
WIN_PROBABILITIES = {
    "class_path": "sppo_lightning.rewards.WinProbabilityReward",
    "init_args": {
        "reward": {
            "class_path": "sppo_lightning.rewards.FunctionReward",
            "init_args": {"function": "support.runs.letter_reward"},
        },
        "scale": 0.5,
    },
}


def summed(*names: str, **weights: float) -> dict[str, Any]:
    """The sum of some losses, as a config names it, all of weight 1 but for ``weights``."""
    return config(
        "CombinedLoss",
        losses={name: CONFIGS[name] for name in names},
        weights=dict.fromkeys(names, 1.0) | weights,
    )


def fit(
    policy: Path,
    prompts: Path,
    root: Path,
    loss: dict[str, Any],
    reward: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    part = root.with_suffix(".yaml")
    given: dict[str, dict[str, Any]] = {"model": {"loss": loss}}
    if reward is not None:
        given["data"] = {"reward": reward}
        changes |= {"data__reward": None, "data__reward__function": None, "data__probe_samples": 3}
    part.write_text(yaml.safe_dump(given))
    settings = {
        "model__loss": None,
        "model__loss__beta": None,
        "data__generator__max_new_tokens": 5,
        "data__iterations": 1,
        "trainer.logger": None,
        **changes,
    }
    main(["fit", f"--config={part}", *cli_arguments(policy, prompts, root, **settings)])
    return root


def logged(run: Path) -> dict[str, float]:
    """The first step's metrics."""
    with (run / "metrics.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row.get("train/loss"))
    return {name: float(value) for name, value in row.items() if value}


def test_all_losses_in_one_sum_whatever_the_batch_size(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """Every loss is named in YAML, trained with and logged; batches of 1 and 4 train the same weights.

    DPOP is logged only, as its gradient jumps where a log-ratio is 0, so that rounding decides over the first step;
    and the optimizer is one that does not blow rounding up.
    """
    runs = [
        fit(
            tiny_policy,
            write_prompts(),
            tmp_path / f"by {size}",
            summed(*CONFIGS, dpop=0.0),
            WIN_PROBABILITIES,
            data__batch_size=size,
            data__epochs_per_iteration=2,
            model__optimizer="torch.optim.SGD",
            model__learning_rate=1e-4,
        )
        for size in (1, 4)
    ]
    first = [logged(run) for run in runs]
    for name in LOSSES:
        assert first[0][f"train/loss/{name}"] == pytest.approx(first[1][f"train/loss/{name}"], abs=1e-5)
    assert first[0]["train/loss"] == pytest.approx(
        sum(first[0][f"train/loss/{name}"] for name in LOSSES if name != "dpop"), rel=1e-5
    )
    assert first[0]["train/loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    assert 0 < first[0]["train/loss/by_gap/weight"] < 1
    before = load_file(tiny_policy / "model.safetensors")
    by_one, by_four = (load_file(run / "policy/model.safetensors") for run in runs)
    moved = 0.0
    for name, value in by_one.items():
        torch.testing.assert_close(by_four[name], value, atol=1e-5, rtol=1e-5)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 1e-4
    for pair in pq.read_table(runs[0] / "iterations/000/pairs.parquet").to_pylist():
        assert pair["chosen_win_probability"] > 0.5 > pair["rejected_win_probability"]
        assert len(pair["reference_chosen_token_logps"]) == len(pair["chosen_token_ids"])


def test_losses_without_reference_have_no_reference_pass_made(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    run = fit(tiny_policy, write_prompts(), tmp_path / "run", summed("simpo", "orpo", "nll"))
    assert json.loads((run / "iterations/000/manifest.json").read_text())["reference_fingerprint"] is None
    pairs = pq.read_table(run / "iterations/000/pairs.parquet").to_pylist()
    assert all(pair["reference_chosen_logp"] != pair["reference_chosen_logp"] for pair in pairs)
    metrics = logged(run)
    assert {f"train/loss/{name}" for name in ("simpo", "orpo", "nll", "orpo/nll")} <= metrics.keys()
    assert metrics["train/loss/nll"] == pytest.approx(metrics["train/loss/orpo/nll"])
    assert not any(name.startswith("train/logratios") for name in metrics)


class SometimesUnknown(Reward):
    """Says of one response in three how likely it wins that it does not know."""

    gives_win_probabilities = True

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        rewards = letter_reward([prompt.text for prompt in prompts], list(responses), [])
        known = [0.5 if place % 3 else float("nan") for place in range(len(rewards))]
        return Scores(rewards, parts={"win_probability": known})


@pytest.mark.parametrize(
    ("loss", "reward", "message"),
    [
        (
            summed("dpo", "sppo_soft"),
            None,
            "model.loss CombinedLoss needs win probabilities, but data.reward FunctionReward gives none: use",
        ),
        (
            CONFIGS["sppo_soft"],
            {"class_path": f"{__name__}.SometimesUnknown"},
            "model.loss SPPOSoftLoss needs win probabilities, but ",
        ),
        (
            config("CombinedLoss", losses={"dpo": CONFIGS["dpo"]}, weights={"dpo": 0.0}),
            None,
            "CombinedLoss.weights={'dpo': 0.0} sum to 0: give one loss a weight greater than 0",
        ),
        (config("HingeLoss", beta=-1.0), None, "HingeLoss.beta=-1.0 must be greater than 0"),
    ],
    ids=["no win probabilities", "unknown ones", "weights", "beta"],
)
def test_bad_input(
    loss: dict[str, Any],
    reward: dict[str, Any] | None,
    message: str,
    tiny_policy: Path,
    write_prompts: WritePrompts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        fit(tiny_policy, write_prompts(), tmp_path / "run", loss, reward)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/policy").exists()
