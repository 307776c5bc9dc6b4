"""The gate between iterations, and what it decides on, in whole runs."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import IterationGate, PolicyExport
from sppo_lightning.evaluation.gate import Decision, read_decisions
from sppo_lightning.export.finished_run import open_run
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
ALWAYS = {"bounds": {"val/kl/initial": -100.0}}  # no policy passes
NEVER = {"tolerance": 1e6}


def arguments(policy: Path, prompts: Path, root: Path, gate: dict[str, Any], **changes: Any) -> list[str]:
    settings = {
        "data__eval_prompts": prompts / "eval.jsonl",
        "trainer__callbacks": json.dumps(
            [{"class_path": "sppo_lightning.callbacks.IterationGate", "init_args": gate}]
        ),
        **changes,
    }
    return ["fit", *cli_arguments(policy, prompts / "train.jsonl", root, **settings)]


@pytest.fixture
def fit(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path
) -> Callable[..., tuple[RunFolder, list[Decision]]]:
    def run(gate: dict[str, Any], **changes: Any) -> tuple[RunFolder, list[Decision]]:
        main(arguments(tiny_policy, counting_prompts, tmp_path / "run", gate, **changes))
        folder = RunFolder(tmp_path / "run")
        return folder, read_decisions(folder)

    return run


Fit = Callable[..., tuple[RunFolder, list[Decision]]]


def logged(folder: RunFolder, name: str) -> list[float]:
    with folder.metrics.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_a_step_back_is_reverted_with_a_smaller_rate(
    fit: Fit, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing passes: each iteration samples from the initial policy, and the run ends with it to the last bit."""
    folder, decisions = fit(ALWAYS)
    assert [(item.finished, item.action, item.best) for item in decisions] == [
        (1, "revert", 0),
        (2, "revert", 0),
    ]
    assert [item.learning_rate_factor for item in decisions] == [0.5, 0.25]
    prints = [folder.iteration(n).read_manifest() or {} for n in range(2)]
    assert prints[0]["policy_fingerprint"] == prints[1]["policy_fingerprint"]
    found, given = (load_file(path / "model.safetensors") for path in (folder.policy, tiny_policy))
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert json.loads((folder.policy / "run.json").read_text())["iteration"] == -1
    assert not folder.best.exists()
    rates = logged(folder, "train/lr")
    half = len(rates) // 2
    assert rates[half:] == pytest.approx([rate / 2 for rate in rates[:half]])
    state = torch.load(folder.last_checkpoint, weights_only=True)
    assert all(not optimizer["state"] for optimizer in state["optimizer_states"])
    said = capsys.readouterr().out
    assert "the initial policy, a Hugging Face folder" in said
    assert "after 1 iteration(s), revert: val/kl/initial is" in said
    with pytest.raises(UserError, match="reverted to the policy that it started from"):
        open_run(folder.root)


def test_the_policy_that_stays_is_kept_as_best(fit: Fit) -> None:
    """Whatever the rewards do, ``best/`` is the policy with the highest mean, which ``export`` can take."""
    folder, decisions = fit(NEVER, data__iterations=3)
    assert [item.action for item in decisions] == ["accept"] * 3
    rewards = logged(folder, "val/reward/mean")
    best = decisions[-1].best
    assert rewards[best] == max(rewards)
    if best == 0:
        assert not folder.best.exists()
        return
    record = json.loads((folder.best / "run.json").read_text())
    assert record["iteration"] == best - 1
    assert record["held_out"]["reward"] == pytest.approx(rewards[best])
    assert open_run(folder.root, iteration="best").iteration == best - 1
    assert [path.name for path in folder.last_checkpoint.parent.glob("weights-*")] == [f"weights-{best:03d}"]


def test_a_run_that_is_stopped_ends_and_is_not_resumed_by_accident(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, decisions = fit({**ALWAYS, "action": "stop"}, data__iterations=3)
    assert [(item.finished, item.action) for item in decisions] == [(1, "stop")]
    assert not folder.iteration(1).folder.exists()
    with pytest.raises(SystemExit):
        fit({**ALWAYS, "action": "stop"}, data__iterations=3)
    assert (
        "IterationGate stopped this run after 1 iteration(s): to go on from the policy that it refused"
        in (capsys.readouterr().err)
    )
    assert not folder.iteration(1).folder.exists()  # nothing was sampled
    _, decisions = fit({**ALWAYS, "action": "warn"}, data__iterations=3)
    assert [(item.finished, item.action) for item in decisions] == [(1, "stop"), (2, "warn"), (3, "warn")]


def test_a_reverted_policy_is_validated_as_what_it_is(
    fit: Fit, tiny_policy: Path, counting_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = fit(ALWAYS, data__iterations=1)
    args = arguments(tiny_policy, counting_prompts, folder.root, ALWAYS, data__iterations=1)
    capsys.readouterr()
    main(["validate", *args[1:], "--ckpt_path", str(folder.last_checkpoint)])
    initial = logged(folder, "val/reward/mean")[0]
    assert f"{initial:.4f}"[:6] in capsys.readouterr().out


@pytest.mark.slow
def test_other_settings_of_the_gate_are_another_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit(NEVER, data__iterations=1)
    with pytest.raises(SystemExit):
        fit({"tolerance": 3.0}, data__iterations=1)
    assert (
        "trainer.callbacks.IterationGate.init_args.tolerance=1000000.0, but this config has 3.0"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_without_kept_weights_there_is_a_warning_only(fit: Fit) -> None:
    """The run was begun by a gate that stops, so that the initial policy's weights were not kept."""
    fit({**ALWAYS, "action": "stop"})
    _, decisions = fit(ALWAYS)
    assert [item.action for item in decisions] == ["stop", "warn"]
    assert decisions[1].reasons[1].endswith("weights-000, to revert to, is not there, or of another strategy")
    assert decisions[1].learning_rate_factor == 1.0


@pytest.mark.slow
def test_what_the_gate_refuses_is_not_exported_whatever_the_order(
    fit: Fit, tiny_policy: Path, counting_prompts: Path, tmp_path: Path
) -> None:
    """The command line puts the gate first, and no policy is kept under the number of one that was given up."""
    classes = ("PolicyExport", {"keep_every_iteration": True}), ("IterationGate", ALWAYS)
    callbacks = [
        {"class_path": f"sppo_lightning.callbacks.{name}", "init_args": args} for name, args in classes
    ]
    folder, _ = fit(ALWAYS, trainer__callbacks=json.dumps(callbacks))
    assert json.loads((folder.policy / "run.json").read_text())["iteration"] == -1
    assert folder.kept_policies() == []


@pytest.mark.parametrize(
    ("callbacks", "error"),
    [
        (
            (PolicyExport, IterationGate),
            "has PolicyExport before IterationGate, and would export what the gate",
        ),
        ((IterationGate, IterationGate), "has two of IterationGate"),
    ],
)
def test_callbacks_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, callbacks: tuple[type, ...], error: str
) -> None:
    made = [kind() for kind in callbacks]
    monkeypatch.setattr("sppo_lightning.callbacks.gate.self_play_data", lambda trainer: None)
    trainer: Any = SimpleNamespace(callbacks=made)
    with pytest.raises(UserError, match=error):
        made[1].setup(trainer, trainer, "fit")


@pytest.mark.slow
def test_a_decision_about_the_same_policy_stands(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tiny_policy: Path, counting_prompts: Path
) -> None:
    """Of a run that was killed between its decision and its checkpoint: what is measured anew may round otherwise."""
    folder, decisions = fit(NEVER, data__iterations=1)
    kept = folder.gate.read_bytes()
    shutil.rmtree(folder.last_checkpoint.parent)
    monkeypatch.setattr("sppo_lightning.callbacks.gate.steps_back", lambda *_, **__: (["other"], -1.0, 0.1))
    _, again = fit(NEVER, data__iterations=1)
    assert again == decisions
    assert folder.gate.read_bytes() == kept


def test_a_gate_needs_held_out_prompts(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit({}, data__eval_prompts=None)
    assert (
        "IterationGate compares policies on held-out prompts, and there are none" in capsys.readouterr().err
    )


def test_a_bound_on_what_is_not_measured_is_named(fit: Fit) -> None:
    with pytest.warns(match="val/reward_model/kl was not measured in iteration 0, and bounds nothing"):
        _, decisions = fit({**NEVER, "bounds": {"val/reward_model/kl": 1.0}}, data__iterations=1)
    assert decisions[0].action == "accept"


@pytest.mark.parametrize(
    "settings", [{"tolerance": -1.0}, {"learning_rate_factor": 0.0}, {"bounds": {"kl": 1.0}}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"IterationGate.{next(iter(settings))}"):
        IterationGate(**settings)


def test_a_collapse_is_undone(tiny_policy: Path, counting_prompts: Path, tmp_path: Path) -> None:
    """A rate at which the policy comes to repeat one token: the run ends below the initial policy, but for the gate."""
    settings = {"model__learning_rate": 1.0, "data__reward__function": "support.runs.variety_reward"}
    last = {}
    for action in ("warn", "revert"):
        gate = {"tolerance": 0.0, "action": action}
        main(arguments(tiny_policy, counting_prompts, tmp_path / action, gate, **settings))
        folder = RunFolder(tmp_path / action)
        rewards = logged(folder, "val/reward/mean")
        last[action] = rewards[read_decisions(folder)[-1].policy] - rewards[0]
    assert last["warn"] < 0 <= last["revert"]
