"""The command line: help, configs, overrides, prompt sources, and what a run writes to the terminal."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments

from sppo_lightning import losses, selection
from sppo_lightning.__main__ import main
from sppo_lightning.cli.main import SelfPlayCLI
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.module import PreferenceModule
from sppo_lightning.rewards import FunctionReward, TorchmetricsReward

ROOT = Path(__file__).parents[2]
COMMANDS = ("fit", "validate", "test", "predict")
Written = Callable[..., Path]
Built = Callable[[list[str]], tuple[Trainer, PreferenceModule, SelfPlayDataModule]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: enough to build a run, not to start it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """Build a run as the command line does, without running it."""

    def build(args: list[str]) -> tuple[Trainer, PreferenceModule, SelfPlayDataModule]:
        found: list[Any] = []

        @functools.wraps(Trainer.fit)
        def fit(trainer: Trainer, model: Any, datamodule: Any, **_: Any) -> None:
            found[:] = [trainer, model, datamodule]

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", fit)
            main(["fit", *args])
        return found[0], found[1], found[2]

    return build


@pytest.fixture
def args(model: Path, write_prompts: Written, tmp_path: Path) -> list[str]:
    return cli_arguments(model, write_prompts(), tmp_path / "run")


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str, Any], str]:
    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return f"--config={path}"

    return write


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command that ends by itself, with status 0, prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert not stop.value.code
    return capsys.readouterr().out


# ---------------------------------------------------------------------- help


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sppo_lightning.report.command.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["report", "runs/a"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "sppo-lightning: stopped by Ctrl-C\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    assert [name for name in COMMANDS if not re.search(rf"^ +{name}  +\w", text, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [(["predict", "--help"], ["predict"]), (["--help"], ["fit", "validate", "test", "predict", "estimate"])],
)
def test_only_the_parser_that_is_needed_is_made(
    args: list[str],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    make = SelfPlayCLI._prepare_subcommand_parser

    def noted(self: SelfPlayCLI, trainer: type, command: str, **settings: Any) -> Any:
        made.append(command)
        return make(self, trainer, command, **settings)

    monkeypatch.setattr(SelfPlayCLI, "_prepare_subcommand_parser", noted)
    printed(args, capsys)
    assert made == expected


def test_help_of_a_command_explains_every_key_after_a_short_usage(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["fit", "--help"], capsys)
    usage = text.partition("\n\n")[0]
    assert usage.startswith("usage: sppo-lightning")
    assert len(usage.splitlines()) == 1
    keys = (
        "data.prompts",
        "data.selection",
        "model.learning_rate",
        "model.policy.pretrained",
        "trainer.precision",
    )
    assert [key for key in keys if f"--{key} " not in text] == []
    assert "samples_per_prompt SAMPLES_PER_PROMPT" in text
    assert "responses that a pair is chosen from" in text


# ------------------------------------------------------------------- configs


def test_print_config_parses_back(
    args: list[str], built: Built, write_config: Callable[[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(["fit", *args, "--print_config"], capsys)
    config = write_config("printed.yaml", text)
    assert printed(["fit", config, "--print_config"], capsys) == text
    _, _, datamodule = built([config])
    assert datamodule.rules.samples_per_prompt == 3


def test_later_configs_and_flags_win(
    args: list[str], built: Built, write_config: Callable[[str, Any], str]
) -> None:
    first = write_config(
        "first.yaml", {"data": {"iterations": 5, "epochs_per_iteration": 2}, "seed_everything": 1}
    )
    second = write_config("second.yaml", {"data": {"iterations": 7}, "model": {"learning_rate": 0.25}})
    base = [arg for arg in args if "data.iterations" not in arg and "learning_rate" not in arg]
    trainer, module, datamodule = built([*base, first, second])
    assert (datamodule.rules.iterations, datamodule.epochs_per_iteration) == (7, 2)
    assert (module.learning_rate, datamodule.rules.seed) == (0.25, 1)
    assert (trainer.max_epochs, trainer.check_val_every_n_epoch) == (14, 2)
    _, module, datamodule = built([*base, second, first, "--model.learning_rate=0.5"])
    assert (datamodule.rules.iterations, module.learning_rate) == (5, 0.5)


def test_a_class_of_a_config_is_replaced_from_the_command_line(
    args: list[str], built: Built, write_config: Callable[[str, Any], str]
) -> None:
    config = write_config(
        "c.yaml",
        {
            "model": {"loss": {"class_path": "sppo_lightning.losses.DPOLoss", "init_args": {"beta": 0.3}}},
            "data": {
                "reward": {
                    "class_path": "sppo_lightning.rewards.FunctionReward",
                    "init_args": {"function": "support.runs.letter_reward"},
                },
                "selection": {
                    "class_path": "sppo_lightning.selection.Easiest",
                    "init_args": {"fraction": 0.5},
                },
            },
        },
    )
    base = [arg for arg in args if not arg.startswith(("--data.reward", "--data.selection", "--model.loss"))]
    _, module, datamodule = built([*base, config])
    assert isinstance(datamodule.reward, FunctionReward)
    assert isinstance(datamodule.rules.selection, selection.Easiest)
    assert isinstance(module.loss, losses.DPOLoss)
    assert module.loss.beta == 0.3
    replaced = [
        *("--data.reward", "sppo_lightning.rewards.TorchmetricsReward"),
        *("--data.reward.metric", "torchmetrics.text.SQuAD", "--data.reward.output", "f1"),
        *("--data.reward.scale", "0.01", "--data.selection", "sppo_lightning.selection.Hardest"),
        *("--data.selection.fraction", "1.0", "--model.loss.beta", "0.7"),
    ]
    _, module, datamodule = built([*base, config, *replaced])
    assert isinstance(datamodule.reward, TorchmetricsReward)
    assert (datamodule.reward.output, datamodule.reward.scale) == ("f1", 0.01)
    assert isinstance(datamodule.rules.selection, selection.Hardest)
    assert isinstance(module.loss, losses.DPOLoss)
    assert module.loss.beta == 0.7


def test_the_optimizer_is_fused_adamw_unless_named(args: list[str], built: Built) -> None:
    """Also where it is the command line that builds it."""
    trainer, module, _ = built(args)
    module.trainer, module.policy = trainer, torch.nn.Linear(2, 2)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True
    named = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=0.5"]
    trainer, module, _ = built([*args, *named])
    module.trainer, module.policy = trainer, torch.nn.Linear(2, 2)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.5


def test_values_that_agree_with_what_is_derived_are_no_error(args: list[str], built: Built) -> None:
    flags = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--data.seed=42"]
    trainer, _, datamodule = built([*args, *flags])
    assert (trainer.max_epochs, datamodule.rules.seed) == (2, 42)


# ------------------------------------------------------------------- prompts


def test_prompt_sources(args: list[str], built: Built, write_prompts: Written, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(3):
        write_prompts(f"parts/{number}.jsonl", count=4, start=4 * number)
    plain, chat = tmp_path / "plain.csv", tmp_path / "chat.json"
    plain.write_text("id,prompt\n" + "".join(f"p{n},Name {n}\n" for n in range(6)))
    turns = [[{"role": "user", "content": f"Name {n}"}] for n in range(6, 12)]
    chat.write_text(json.dumps([{"id": f"p{n + 6}", "messages": turn} for n, turn in enumerate(turns)]))
    base = [arg for arg in args if not arg.startswith("--data.prompts=")]
    for source in (folder, folder / "*.jsonl", [plain, chat], [folder / f"{n}.jsonl" for n in range(3)]):
        value = json.dumps([str(path) for path in source]) if isinstance(source, list) else source
        _, _, datamodule = built([*base, f"--data.prompts={value}"])
        prompts = datamodule.prompt_sets.read("prompts")
        assert [prompt.id for prompt in prompts] == [f"p{number}" for number in range(12)]


# ----------------------------------------------------------------- callbacks


def test_the_gate_decides_first_and_a_report_reads_last(args: list[str], built: Built) -> None:
    """Wherever a user names them; Lightning puts what saves checkpoints behind all others."""
    mine = [
        {"class_path": f"sppo_lightning.callbacks.{name}"}
        for name in ("ReportFile", "SampleTable", "IterationGate")
    ]
    trainer, _, _ = built([*args, f"--trainer.callbacks={json.dumps(mine)}"])
    names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert names[0] == "IterationGate"
    assert names[-2:] == ["ReportFile", "RunCheckpoint"]
    assert names.count("ReportFile") == 1
    plain = [type(callback).__name__ for callback in built(args)[0].callbacks]  # type: ignore[attr-defined]
    assert plain[-2:] == ["ReportFile", "RunCheckpoint"]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of ``python -m``, with every warning shown; its folder and standard error."""
    folder = tmp_path_factory.mktemp("shell")
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"Say {n}"}) + "\n" for n in range(8)))
    callback = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder / "mine"), "filename": "mine"},
        }
    ]
    changes: dict[str, Any] = {"data__iterations": 1, "data__generator__max_new_tokens": 4}
    changes |= {"trainer__callbacks": json.dumps(callback), "trainer__logger": None}
    args = cli_arguments(tiny_policy, prompts, folder / "run", **changes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-W", "default::DeprecationWarning", "-m", "sppo_lightning", "fit", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Iterations" in done.stdout
    return folder, done.stderr


def test_a_run_shows_no_warning_that_a_user_cannot_act_on(run: tuple[Path, str]) -> None:
    """``-W default`` shows what Python hides by default; torch's own notices are its own affair."""
    lines = [line for line in run[1].replace("\r", "\n").splitlines() if "/torch/" not in line]
    assert any("Trainer.fit` stopped" in line for line in lines)  # the log is there
    assert [
        line for line in lines if re.search("deprecat|jsonargparse|across ranks is zero", line, re.I)
    ] == []
    assert [line for line in lines if "sppo_lightning" in line and "arning" in line] == []


def test_a_run_goes_on_from_its_own_config(
    run: tuple[Path, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a checkpoint callback of the user's beside the run's own one."""
    folder = run[0]
    assert (folder / "mine/mine.ckpt").exists()
    last = folder / "run/checkpoints/last.ckpt"
    before = (folder / "run/iterations/000/manifest.json").read_text()
    monkeypatch.chdir(folder)
    main(["fit", f"--config={folder / 'run/config.yaml'}"])
    assert f"Continuing the run in {folder / 'run'} from {last}" in capfd.readouterr().err
    assert (folder / "run/iterations/000/manifest.json").read_text() == before
