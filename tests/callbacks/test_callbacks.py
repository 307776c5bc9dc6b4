"""Callbacks, called directly; in a whole fit they are tested in integration/."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from sppo_lightning.callbacks import (
    DifficultyReestimation,
    PhaseTimes,
    PolicyExport,
    RunSummary,
    SampleTable,
    SelfPlayProgress,
)
from sppo_lightning.policy.config import LoRAConfig
from sppo_lightning.policy.folder import write_folder
from sppo_lightning.policy.lora import with_adapter
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.types import PhaseProgress, Rollout

RULES = SimpleNamespace(seed=3, probe_samples=2)
IDS = [f"p{number}" for number in range(200)]


def rollout(prompt_id: str, response: str, reward: float) -> Rollout:
    return Rollout(prompt_id, 0, f"say {prompt_id}", response, (5, 6, 1), "stop", reward)


# ------------------------------------------------------- DifficultyReestimation


def test_all_prompts_are_due_by_default() -> None:
    decision = DifficultyReestimation().decide(IDS, set(), iteration=0, rules=RULES)
    assert decision.prompt_ids == tuple(IDS)
    assert decision.samples == 2
    assert decision.smoothing == 0.0


def test_only_selected_prompts_are_due_when_told_so() -> None:
    callback = DifficultyReestimation(prompts="selected", samples=7, smoothing=0.5)
    decision = callback.decide(IDS, {"p3", "p9"}, iteration=0, rules=RULES)
    assert decision.prompt_ids == ("p3", "p9")
    assert (decision.samples, decision.smoothing) == (7, 0.5)


def test_nothing_is_due_between_two_reestimations() -> None:
    callback = DifficultyReestimation(every_n_iterations=3)
    due = [bool(callback.decide(IDS, set(), iteration=k, rules=RULES).prompt_ids) for k in range(6)]
    assert due == [False, False, True, False, False, True]


def test_a_share_is_random_and_depends_on_ids_and_iteration_only() -> None:
    callback = DifficultyReestimation(share=0.3)
    first = callback.decide(IDS, set(), iteration=0, rules=RULES).prompt_ids
    backwards = callback.decide(IDS[::-1], set(), iteration=0, rules=RULES).prompt_ids
    assert set(first) == set(backwards)
    assert 30 <= len(first) <= 90
    assert set(first) != set(callback.decide(IDS, set(), iteration=1, rules=RULES).prompt_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_iterations": 0}, "every_n_iterations=0 must be at least 1"),
        ({"share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
        ({"share": 1.5}, r"share=1.5 must lie in \(0, 1\]"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"smoothing": 1.0}, r"smoothing=1.0 must lie in \[0, 1\)"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DifficultyReestimation(**settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------ PolicyExport


def test_export_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    policy, tokenizer = LlamaForCausalLM(tiny_config()), byte_tokenizer()
    policy.config.use_cache = False
    trained = SimpleNamespace(
        save=lambda folder, is_rank0: write_folder(policy, tokenizer, folder),
        current=lambda: SimpleNamespace(fingerprint=lambda: "abc"),
    )
    target = tmp_path / "policy"
    target.mkdir()
    (target / "left-behind").touch()
    PolicyExport().export(trained, target, iteration=4)  # type: ignore[arg-type]
    assert json.loads((target / "run.json").read_text()) == {"iteration": 4, "fingerprint": "abc"}
    assert not (target / "left-behind").exists()
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.use_cache
    assert not policy.config.use_cache
    for name, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("dora", [False, True])
def test_the_folder_of_an_adapter_says_how_it_is_read(tmp_path: Path, dora: bool) -> None:
    model = LlamaForCausalLM(tiny_config())
    model.generation_config = GenerationConfig(eos_token_id=[1, 7])
    lora = LoRAConfig(rank=2, alpha=4, dora=dora)
    write_folder(with_adapter(model, lora, pretrained="org/base"), byte_tokenizer(), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, 7]
    text = (tmp_path / "README.md").read_text()
    assert "Its base is `org/base`" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")' in text
    assert "`sppo-lightning export`" in text
    assert ("leaves out the magnitudes" in text) is dora
    assert "More Information Needed" not in text


def test_the_folder_of_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny_config())
    adapted = with_adapter(model, LoRAConfig(rank=2, alpha=4), pretrained="/data/base.Q4_0.gguf")
    write_folder(adapted, byte_tokenizer(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("/data", gguf_file="base.Q4_0.gguf")' in text


# -------------------------------------------------------------------- PhaseTimes


def test_phase_times_add_up_to_the_iterations_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: 1 s of loading, two probes of 2 and 3 s, 4 s of training in two batches, 5 s after."""
    now = 100.0
    logged: list[dict[str, float]] = []
    monkeypatch.setattr("sppo_lightning.callbacks.times.time.perf_counter", lambda: now)
    datamodule = SimpleNamespace(iteration_ends=True, current_iteration=0)
    monkeypatch.setattr("sppo_lightning.callbacks.base.self_play_data", lambda trainer: datamodule)
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))
    trainer: Any = SimpleNamespace(
        is_global_zero=True, loggers=[logger], global_step=7, state=SimpleNamespace(fn="fit")
    )
    module, batch = cast(Any, None), cast(Any, None)
    callback = PhaseTimes()
    callback.setup(trainer, module, "fit")
    now += 1
    for seconds in (2, 3):
        callback.on_phase_progress(trainer, PhaseProgress("probing", 0, 0, 2, 0))
        now += seconds
        callback.on_phase_progress(trainer, PhaseProgress("probing", 0, 1, 2, 9))
        callback.on_phase_progress(trainer, PhaseProgress("probing", 0, 2, 2, 9))
    callback.on_train_epoch_start(trainer, module)
    for seconds in (1, 3):
        now += seconds
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    now += 5
    callback.on_train_epoch_end(trainer, module)
    assert logged == [{"time/probing": 5, "time/training": 4, "time/other": 6}]
    now += 8
    callback.on_train_epoch_end(trainer, module)
    assert logged[1] == {"time/other": 8}


# ------------------------------------------------------------------- SampleTable


def test_sample_table_shows_both_answers_and_escapes_them() -> None:
    before = [rollout("a", "one | two\nthree", 0.25), rollout("b", "<script>", 0.0)]
    after = [rollout("b", "x" * 50, 1.0), rollout("a", "better", 0.5)]
    table = SampleTable(max_characters=20)
    lines = table.render(table.rows(before, after), finished=2).splitlines()
    assert lines[0] == "| prompt | initial policy | reward | after 2 iteration(s) | reward |"
    assert lines[2] == "| say a | one \\| two three | 0.250 | better | 0.500 |"
    assert lines[3] == f"| say b | &lt;script> | 0.000 | {'x' * 19}… | 1.000 |"


@pytest.mark.parametrize("name", ["prompts", "max_characters"])
def test_sample_table_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        SampleTable(**{name: 0})


# -------------------------------------------------------------------- RunSummary


def test_summary_tells_iterations_evaluations_and_answers(tmp_path: Path) -> None:
    """Two held-out answers: 0.0 -> 0.5 and 0.5 -> 0.5: gain 0.25 ± 0.25, one win and one tie = 75 %."""
    folder = RunFolder(tmp_path)
    metrics = {f"iteration/difficulty/q{q}": q / 100 for q in (25, 50, 75)}
    manifest = {
        "complete": True,
        "metrics": {**metrics, "iteration/reward/mean": 0.4},
        "counts": {"selected": 8, "pairs": 6},
        "dropped": {"tied_rewards": 2, "not_selected": 4},
    }
    folder.iteration(0).write_manifest(manifest)
    for number, rewards in ((0, (0.0, 0.5)), (1, (0.5, 0.5))):
        rows = [rollout(f"p{n}", f"answer {number}{n}", reward) for n, reward in enumerate(rewards)]
        write_rollouts(folder.evaluation(f"{number:03d}") / "rollouts.parquet", rows)
    text = RunSummary(prompts=1).render(folder, iterations=3)
    assert "0.400" in text
    assert "0.250 / 0.500 / 0.750" in text
    assert "4 not_selected, 2 tied_rewards" in text
    assert "+0.250 ± 0.250" in text
    assert "75.0%" in text
    assert "before (0.00)  answer 00" in text
    assert "after  (0.50)  answer 10" in text
    assert "answer 11" not in text
    assert str(tmp_path / "policy") in text


def test_summary_leaves_out_a_prompt_that_the_last_policy_did_not_answer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number, names in ((0, ("p0", "p1")), (1, ("p1",))):
        rows = [rollout(name, f"answer {number} to {name}", 0.5) for name in names]
        write_rollouts(folder.evaluation(f"{number:03d}") / "rollouts.parquet", rows)
    text = RunSummary().render(folder, iterations=1)
    assert "answer 1 to p1" in text
    assert "answer 0 to p0" not in text


def test_summary_of_a_run_without_held_out_prompts(tmp_path: Path) -> None:
    assert "Held-out" not in RunSummary().render(RunFolder(tmp_path), iterations=1)


# -------------------------------------------------------------- SelfPlayProgress


def test_progress_shows_phase_count_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SelfPlayProgress()
    for done in range(4):
        progress.on_phase_progress(cast(Any, None), PhaseProgress("probing", 2, done, 3, done * 100))
    shown = capsys.readouterr().err
    assert "iteration 2 probing" in shown
    assert "3/3" in shown
    assert "tokens/s" in shown


def test_progress_moves_inside_a_batch_and_never_back(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SelfPlayProgress()
    trainer = cast(Any, None)
    progress.on_phase_progress(trainer, PhaseProgress("probing", 2, 0, 8, 0))
    shown = []
    for under_way in (0.31, 2.0, 1.2, 7.9):
        progress.on_sampling_progress(trainer, PhaseProgress("probing", 2, 0, 8, 40, under_way))
        shown.append(progress._bar.n)
    progress.on_phase_progress(trainer, PhaseProgress("probing", 2, 1, 8, 50))
    shown.append(progress._bar.n)
    assert shown == [0.3, 2.0, 2.0, 7.9, 7.9]
    progress.on_phase_progress(trainer, PhaseProgress("probing", 2, 8, 8, 80))
    assert "8/8" in capsys.readouterr().err


def test_progress_is_silent_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SelfPlayProgress()
    progress.disable()
    progress.on_phase_progress(cast(Any, None), PhaseProgress("probing", 0, 0, 3, 0))
    assert capsys.readouterr().err == ""
