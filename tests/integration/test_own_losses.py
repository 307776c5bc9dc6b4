"""Losses and callbacks of a user's own, by ``class_path``, in a whole run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.runs import cli_arguments
from torch.nn.functional import logsigmoid

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import SelfPlayCallback
from sppo_lightning.losses import (
    LossInputs,
    PairLogps,
    PreferenceLoss,
    PreferenceTerms,
    dpo_loss,
)
from sppo_lightning.selection import AllPairs

WritePrompts = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore")


class LengthNormalised(PreferenceLoss):
    """SimPO (arXiv 2405.14734), with its margin scaled by the gap of the rewards."""

    needs_reference = False
    parts = ("gap",)
    seen: ClassVar[list[LossInputs]] = []

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        LengthNormalised.seen.append(inputs)
        chosen = self.beta * inputs.policy.chosen / inputs.lengths.chosen
        rejected = self.beta * inputs.policy.rejected / inputs.lengths.rejected
        gap = inputs.rewards.chosen - inputs.rewards.rejected
        return PreferenceTerms(
            -logsigmoid(chosen - rejected - gap), chosen.detach(), rejected.detach(), {"gap": gap}
        )


class DPOByToken(PreferenceLoss):
    """DPO from the log-probs of single tokens."""

    needs_token_logps = True

    def terms(self, inputs: LossInputs) -> PreferenceTerms:
        assert inputs.policy_tokens is not None
        assert inputs.reference_tokens is not None
        for tokens, lengths in zip(inputs.policy_tokens, inputs.lengths, strict=True):
            assert tokens.shape == (len(lengths), max(max(lengths) for lengths in inputs.lengths))
        sums = [
            PairLogps(tokens.chosen.sum(-1), tokens.rejected.sum(-1))
            for tokens in (inputs.policy_tokens, inputs.reference_tokens)
        ]
        return dpo_loss(*sums, beta=0.1)


class OfTwoArguments(PreferenceLoss):
    """As losses were written before they saw named fields."""

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PreferenceTerms:
        return dpo_loss(policy, reference, beta=0.1)


def fit(policy: Path, prompts: Path, root: Path, **changes: Any) -> Path:
    settings = {"data__generator__max_new_tokens": 5, "data__pairs_per_step": 2, **changes}
    main(["fit", *cli_arguments(policy, prompts, root, **settings)])
    return root


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_loss_without_reference_has_no_reference_pass_made(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    LengthNormalised.seen.clear()
    run = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        model__loss=f"{__name__}.LengthNormalised",
        model__loss__beta=2.0,
        **{"trainer.callbacks": json.dumps([{"class_path": f"{__name__}.Follower"}])},
    )
    assert {progress.phase for progress in Follower.phases} == {"probing", "generating", "scoring"}
    assert json.loads((run / "iterations/001/manifest.json").read_text())["reference_fingerprint"] is None
    pairs = pq.read_table(run / "iterations/001/pairs.parquet").to_pylist()
    assert all(pair["reference_chosen_logp"] != pair["reference_chosen_logp"] for pair in pairs)
    assert any(row.get("train/gap") for row in rows(run))
    assert not any(name.startswith("train/logratios") for name in rows(run)[0])
    (first, *_) = LengthNormalised.seen
    by_gap = {
        pair["chosen_reward"]: pair
        for pair in pq.read_table(run / "iterations/000/pairs.parquet").to_pylist()
    }
    for reward, length in zip(first.rewards.chosen.tolist(), first.lengths.chosen.tolist(), strict=True):
        assert len(by_gap[reward]["chosen_token_ids"]) == length
    assert first.policy_tokens is None
    assert first.win_probabilities.chosen.isnan().all()


def test_log_probs_by_token_add_up_to_those_of_responses(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    prompts = write_prompts()
    known = {"data__epochs_per_iteration": 2, "data__iterations": 1}
    whole = fit(tiny_policy, prompts, tmp_path / "whole", **known)
    by_token = fit(
        tiny_policy,
        prompts,
        tmp_path / "token",
        model__loss=f"{__name__}.DPOByToken",
        model__loss__beta=None,
        **known,
    )
    for pair in pq.read_table(by_token / "iterations/000/pairs.parquet").to_pylist():
        for side in ("chosen", "rejected"):
            tokens = pair[f"reference_{side}_token_logps"]
            assert len(tokens) == len(pair[f"{side}_token_ids"])
            assert sum(tokens) == pytest.approx(pair[f"reference_{side}_logp"], abs=1e-9)
    weights = [load_file(run / "policy/model.safetensors") for run in (whole, by_token)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5)


def test_a_loss_of_two_arguments_works_as_before(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    prompts = write_prompts()
    ours = fit(tiny_policy, prompts, tmp_path / "ours")
    own = fit(
        tiny_policy,
        prompts,
        tmp_path / "own",
        model__loss=f"{__name__}.OfTwoArguments",
        model__loss__beta=None,
    )
    weights = [(run / "policy/model.safetensors").read_bytes() for run in (ours, own)]
    assert weights[0] == weights[1]


def test_a_rule_that_needs_the_reference_is_refused_without_one(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model__loss": f"{__name__}.LengthNormalised",
        "model__loss__beta": 2.0,
        "data__pair_selection": f"{__name__}.ByReference",
    }
    with pytest.raises(SystemExit):
        fit(tiny_policy, write_prompts(), tmp_path / "run", **settings)
    assert (
        "ByReference needs 'reference_chosen_logp', but model.loss LengthNormalised"
        in capsys.readouterr().err
    )


class ByReference(AllPairs):
    """Asks for what a run without a reference has not."""

    requires = ("reference_chosen_logp",)


# ------------------------------------------------------------------------- callbacks


class Follower(SelfPlayCallback):
    """Keeps what it is called with."""

    phases: ClassVar[list[Any]] = []
    ends: ClassVar[list[tuple[int, int, int]]] = []

    def __init__(self) -> None:
        Follower.phases.clear()
        Follower.ends.clear()

    def on_phase_progress(self, trainer: Any, progress: Any) -> None:
        Follower.phases.append(progress)

    def on_iteration_end(self, trainer: Any, data: Any, iteration: int) -> None:
        Follower.ends.append((iteration, len(data.pairs), trainer.global_step))


def test_a_callback_follows_phases_and_iterations(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    run = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        data__epochs_per_iteration=2,
        **{"trainer.callbacks": json.dumps([{"class_path": f"{__name__}.Follower"}])},
    )
    counts = [json.loads((run / f"iterations/00{k}/manifest.json").read_text())["counts"] for k in (0, 1)]
    steps = [2 * -(-count["pairs"] // 2) for count in counts]
    assert Follower.ends == [(0, counts[0]["pairs"], steps[0]), (1, counts[1]["pairs"], sum(steps))]
    reference = [p for p in Follower.phases if p.phase == "reference" and p.done == p.total]
    assert [(p.iteration, p.total) for p in reference] == [(k, counts[k]["pairs"]) for k in (0, 1)]
