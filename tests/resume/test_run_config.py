"""Where a run goes on, and what of its folder keeps it from that."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sppo_lightning.cli.main import SECTIONS
from sppo_lightning.redaction import MASK
from sppo_lightning.resume import run_config
from sppo_lightning.resume.checkpoints import check_checkpoint, verify_checkpoint
from sppo_lightning.rewards import Reward
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import record_sizes
from sppo_lightning.types import Prompt, ResumeMode, UserError

CONFIG: dict[str, Any] = {
    "seed_everything": 42,
    "trainer": {"precision": "32-true", "devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": None},
    "model": {"learning_rate": 1e-3, "loss": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}}},
    "data": {
        "iterations": 3,
        "batch_size": 2,
        "pairs_per_step": 4,
        "resume": "auto",
        "keep_iterations": None,
    },
}


def resume_path(root: Path, *settings: Any, **more: Any) -> Path | None:
    return run_config.resume_path(RunFolder(root), *settings, sections=SECTIONS, **more)


def changed(**changes: Any) -> dict[str, Any]:
    """The config with other values, by section and key."""
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in CONFIG.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section] = {**config[section], key: value} if key else value
    return config


def checkpoint(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"w{n}": torch.arange(100.0) + n for n in range(3)}, "epoch": 3}, path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in which a run has begun iteration 0."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    begin(tmp_path, 0)
    return tmp_path


def begin(root: Path, number: int) -> None:
    if number:
        RunFolder(root).iteration(number - 1).write_manifest({"iteration": number - 1, "complete": True})
    RunFolder(root).iteration(number).write_manifest({"iteration": number, "complete": False})


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("mode", ["auto", "never"])
@pytest.mark.parametrize("files", [[], ["tensorboard/events", "evaluations/test-000/manifest.json", ".lock"]])
def test_a_folder_without_a_run(tmp_path: Path, mode: ResumeMode, files: list[str]) -> None:
    """Other commands may have written into it."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints").mkdir()
    assert resume_path(tmp_path, mode, CONFIG) is None
    assert resume_path(tmp_path / "new", mode, CONFIG) is None
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_no_checkpoint_yet_begins_anew_with_what_is_stored(root: Path) -> None:
    assert resume_path(root, "auto", CONFIG) is None


@pytest.mark.parametrize("mode", ["auto", "must"])
def test_a_run_goes_on_from_its_checkpoint(root: Path, mode: ResumeMode) -> None:
    begin(root, 1)
    last = checkpoint(root / "checkpoints/last.ckpt")
    assert resume_path(root, mode, CONFIG) == last


@pytest.mark.parametrize("mode", ["auto", "must"])
def test_a_run_goes_on_from_a_linked_folder(root: Path, mode: ResumeMode) -> None:
    last = root / "checkpoints/last.ckpt"
    checkpoint(root / "checkpoints/step-00000004/meta.pt")
    last.symlink_to("step-00000004", target_is_directory=True)
    assert resume_path(root, mode, CONFIG) == last


@pytest.mark.parametrize("there", ["config.yaml", "iterations", "checkpoints"])
def test_never_refuses_a_folder_that_holds_a_run(tmp_path: Path, there: str) -> None:
    if there == "config.yaml":
        (tmp_path / there).write_text(yaml.safe_dump(CONFIG))
    elif there == "iterations":
        begin(tmp_path, 0)
    else:
        checkpoint(tmp_path / "checkpoints/last.ckpt")
    message = (
        rf"^data\.resume=never, but {re.escape(str(tmp_path))} holds a run: use another trainer\.default_root_dir, or "
        r"data\.resume=auto to resume it$"
    )
    with pytest.raises(UserError, match=message):
        resume_path(tmp_path, "never", CONFIG)


def test_must_refuses_a_folder_without_a_checkpoint(root: Path, tmp_path: Path) -> None:
    message = r"^data\.resume=must, but there is no .*last\.ckpt: check trainer\.default_root_dir, or use"
    for folder in (root, tmp_path / "new"):
        with pytest.raises(UserError, match=message):
            resume_path(folder, "must", CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"data__batch_size": 1},
        {"data__resume": "must"},
        {"data__keep_iterations": 2},
        {"trainer__devices": 4},
        {"trainer__num_nodes": 2},
        {"trainer__strategy": "ddp"},
        {"trainer__callbacks": [{"class_path": "sppo_lightning.callbacks.SampleTable"}]},
    ],
)
def test_what_may_change_between_two_starts(root: Path, change: dict[str, Any]) -> None:
    assert resume_path(root, "auto", changed(**change)) is None


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        ({"data__pairs_per_step": 8}, r"data\.pairs_per_step=4, but this config has 8"),
        ({"seed_everything": 1}, "seed_everything=42, but this config has 1"),
        (
            {"trainer__precision": "bf16-mixed"},
            r"trainer\.precision='32-true', but this config has 'bf16-mixed'",
        ),
    ],
)
def test_another_config_is_refused(root: Path, change: dict[str, Any], wording: str) -> None:
    with pytest.raises(
        UserError, match=rf"holds a run with {wording}: use another trainer\.default_root_dir, or"
    ):
        resume_path(root, "auto", changed(**change))


def class_of(name: str, **arguments: Any) -> dict[str, Any]:
    """A component of a config."""
    return {"class_path": name if "." in name else f"sppo_lightning.{name}", "init_args": arguments}


class Sandbox(Reward):
    """A user's reward whose results depend on how long it waits."""

    free_settings = Reward.free_settings - {"timeout"}

    def __init__(
        self, timeout: float, batch_size: int = 1, retries: int = 3, limit: int | None = 9
    ) -> None: ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [0.0 for _ in responses]


REWARDS = "sppo_lightning.rewards"
CLASSIFIER = partial(class_of, f"{REWARDS}.SequenceClassificationReward", pretrained="reward")
SERVED = partial(class_of, f"{REWARDS}.ServerReward")
SERVER = partial(class_of, "sppo_lightning.generation.OpenAIServerGenerator")
FOLDER = partial(class_of, "sppo_lightning.generation.ModelFolder")
OWN = partial(class_of, f"{__name__}.Sandbox")


def combined(**weights: float) -> dict[str, Any]:
    parts = {"first": CLASSIFIER(batch_tokens=64), "timeout": SERVED(base_url="http://a", timeout=1.0)}
    return class_of(f"{REWARDS}.CombinedReward", rewards=parts, weights={"first": 1.0, **weights})


def refused(tmp_path: Path, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What is said of a config in the folder of another one's run."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    begin(tmp_path, 0)
    try:
        resume_path(tmp_path, "auto", now)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("data__reward", CLASSIFIER(batch_tokens=64), CLASSIFIER(batch_tokens=None, between_phases="free")),
        (
            "data__reward",
            class_of(f"{REWARDS}.LengthPenalty", reward=SERVED(base_url="http://a"), per_character=0.1),
            class_of(f"{REWARDS}.LengthPenalty", reward=SERVED(base_url="http://b"), per_character=0.1),
        ),
        (
            "data__generator",
            SERVER(weight_sync=FOLDER(folder="a"), max_concurrency=1),
            SERVER(weight_sync=FOLDER(folder="b"), max_concurrency=2),
        ),
        ("data__reward", OWN(timeout=1.0, batch_size=1), OWN(timeout=1.0, batch_size=2)),
        # of another package's class, the component decides that it is an argument of
        (
            "data__reward",
            class_of(
                f"{REWARDS}.TorchmetricsReward", metric=class_of("torchmetrics.text.BERTScore", batch_size=1)
            ),
            class_of(
                f"{REWARDS}.TorchmetricsReward", metric=class_of("torchmetrics.text.BERTScore", batch_size=2)
            ),
        ),
        ("model__policy", {"pretrained": "a"}, {"pretrained": "a", "gradient_checkpointing": True}),
        ("model__pair_forward", None, class_of("pair_forward.AutoForward", chunk=64)),
        (
            "model__pair_forward",
            class_of("pair_forward.AutoForward", chunk=64),
            class_of("pair_forward.SharedForward", chunk=32, compiled=True),
        ),
        ("data__test_prompts", None, "test.jsonl"),
        # arguments that the version did not know that wrote the config: their defaults
        ("data__reward", OWN(timeout=1.0), OWN(timeout=1.0, retries=3)),
        ("data__max_prompt_tokens", None, 1024),
        (
            "model__policy",
            {"pretrained": "a", "lora": {"rank": 4}},
            {"pretrained": "a", "lora": {"rank": 4, "dropout": 0.0}},
        ),
    ],
)
def test_what_a_class_says_is_free_may_change(tmp_path: Path, key: str, before: Any, now: Any) -> None:
    assert refused(tmp_path, changed(**{key: before}), changed(**{key: now})) is None


def test_a_secret_may_change_and_is_never_shown(tmp_path: Path) -> None:
    def mine(**arguments: Any) -> dict[str, Any]:
        return changed(data__reward=class_of("mine.Reward", **arguments))

    for before in ("sk-1", MASK):  # as an older version wrote it, and as it is written now
        assert refused(tmp_path, mine(api_key=before), mine(api_key="sk-2")) is None
    said = refused(tmp_path, mine(api_key="sk-1"), mine(limit=2))
    assert said is not None
    assert "sk-" not in said
    assert "api_key='(secret, not stored)', but this config has None" in said


@pytest.mark.parametrize(
    ("key", "before", "now", "named"),
    [
        (
            "data__reward",
            CLASSIFIER(dtype="float32"),
            CLASSIFIER(dtype="bfloat16"),
            "data.reward.init_args.dtype='float32', but this config has 'bfloat16'",
        ),
        (
            "data__reward",
            combined(timeout=1.0),
            combined(timeout=2.0),  # a name among others, no setting
            "data.reward.init_args.weights.timeout=1.0, but this config has 2.0",
        ),
        (
            "data__reward",
            OWN(timeout=1.0),
            OWN(timeout=2.0),
            "data.reward.init_args.timeout=1.0, but this config has 2.0",
        ),
        (
            "data__reward",
            OWN(timeout=1.0),
            OWN(timeout=1.0, retries=4),
            "data.reward.init_args.retries=3, but this config has 4",
        ),
        (
            "data__reward",
            OWN(timeout=1.0),  # of an argument that may be null, that is what it stands for
            OWN(timeout=1.0, limit=9),
            "data.reward.init_args.limit=None, but this config has 9",
        ),
        (
            "data__reward",
            OWN(timeout=1.0),
            CLASSIFIER(),
            f"data.reward.class_path='{__name__}.Sandbox', but this config has '{REWARDS}.Sequence",
        ),
        (
            "data__reward",
            class_of("gone.Reward", batch_size=1),
            class_of("gone.Reward", batch_size=2),
            "data.reward.init_args.batch_size=1, but this config has 2",
        ),
        (
            "data__generator",
            SERVER(weight_sync=class_of("sppo_lightning.generation.VLLMAdapter", adapter="a")),
            SERVER(weight_sync=class_of("sppo_lightning.generation.VLLMAdapter", adapter="b")),
            "data.generator.init_args.weight_sync.init_args.adapter='a', but this config has 'b'",
        ),
        (
            "model__loss",
            class_of("losses.DPOLoss", beta=0.1),
            class_of("losses.DPOLoss", beta=0.2),
            "model.loss.init_args.beta=0.1, but this config has 0.2",
        ),
        (
            "model__policy",
            {"pretrained": "a", "lora": {"rank": 4}},
            {"pretrained": "a", "lora": {"rank": 4, "dropout": 0.1}},
            "model.policy.lora.dropout=0.0, but this config has 0.1",
        ),
        (
            "model__policy",
            {"pretrained": "a"},
            {"pretrained": "a", "lora": {"rank": 4}},
            "model.policy.lora.rank=None, but this config has 4",
        ),
        (
            "trainer__callbacks",
            None,
            [class_of("callbacks.DifficultyReestimation", share=0.5)],
            "trainer.callbacks.DifficultyReestimation.class_path=None, but this config has",
        ),
        (
            "data__selection",
            class_of("selection.Band", batch_size=1),  # free as a key of data, not of what stands there
            class_of("selection.Band", batch_size=2),
            "data.selection.init_args.batch_size=1, but this config has 2",
        ),
        (
            "data__eval_prompts",
            None,
            "eval.jsonl",
            "data.eval_prompts=None, but this config has 'eval.jsonl'",
        ),
    ],
)
def test_what_decides_results_is_refused_by_name(
    tmp_path: Path, key: str, before: Any, now: Any, named: str
) -> None:
    message = refused(tmp_path, changed(**{key: before}), changed(**{key: now}))
    assert message is not None
    assert f"{tmp_path} holds a run with {named}" in message


@pytest.mark.parametrize("content", [None, "", "- a", "trainer: {", "a: 1"])
def test_a_run_whose_config_is_gone_or_damaged(root: Path, content: str | None) -> None:
    path = root / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    what = "holds a run, but its config.yaml is gone" if content is None else "config.yaml is damaged"
    message = rf"{what}: restore it from a copy, or, if you are sure .* by giving the same command with --print_config "
    with pytest.raises(UserError, match=message):
        resume_path(root, "auto", CONFIG)


def test_a_checkpoint_that_is_gone_is_missed_at_once(root: Path) -> None:
    """Iteration 1 cannot have begun without it; unless no checkpoints were written at all."""
    begin(root, 1)
    message = (
        rf"^{re.escape(str(root))}/checkpoints/last\.ckpt is gone, and iterations/001 was sampled from the policy that "
        r"it held: restore it, or start anew in another trainer\.default_root_dir$"
    )
    with pytest.raises(UserError, match=message):
        resume_path(root, "auto", CONFIG)
    assert resume_path(root, "auto", changed(trainer__enable_checkpointing=False)) is None


def test_a_checkpoint_that_is_named_stands_in_for_the_runs_own(root: Path, tmp_path: Path) -> None:
    begin(root, 1)
    given = checkpoint(tmp_path / "kept.ckpt")
    for mode in ("auto", "must"):
        assert resume_path(root, mode, CONFIG, given=given) == given
    with pytest.raises(UserError, match=r"data\.resume=never, but .* holds a run"):
        resume_path(root, "never", CONFIG, given=given)
    with pytest.raises(UserError, match=r"ckpt_path='.*missing\.ckpt': no such file"):
        resume_path(root, "auto", CONFIG, given=tmp_path / "missing.ckpt")
    with pytest.raises(UserError, match="holds a run with"):
        resume_path(root, "auto", changed(seed_everything=3), given=given)


def test_a_link_that_leads_nowhere(root: Path) -> None:
    (root / "checkpoints").mkdir()
    (root / "checkpoints/last.ckpt").symlink_to("step-00000004")
    with pytest.raises(
        UserError, match=r"last\.ckpt' is a link to step-00000004, which is gone: restore that folder"
    ):
        resume_path(root, "auto", CONFIG)


def test_a_missing_iteration_is_missed_at_once(root: Path) -> None:
    begin(root, 2)
    checkpoint(root / "checkpoints/last.ckpt")
    (root / "iterations/000/manifest.json").unlink()
    with pytest.raises(UserError, match="000 is gone or incomplete although iteration 1 was made after it"):
        resume_path(root, "auto", CONFIG)


# ------------------------------------------------------------------ checkpoints


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    verify_checkpoint(checkpoint(tmp_path / "last.ckpt"))


@pytest.mark.parametrize(
    "harm", [lambda content: b"", lambda content: content[:-9], lambda content: content[: len(content) // 2]]
)
def test_a_checkpoint_that_was_cut_short(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    path = checkpoint(tmp_path / "last.ckpt")
    path.write_bytes(harm(path.read_bytes()))
    message = r"^name='.*last\.ckpt' is no checkpoint, or was cut short: restore it from a copy, or name another with"
    with pytest.raises(UserError, match=message):
        check_checkpoint(path, "name")
    with pytest.raises(
        UserError, match=r"last\.ckpt is damaged \(.+\): restore it from a copy, or start anew"
    ):
        verify_checkpoint(path)


def test_flipped_bits_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    """Loading finds few of them. What is not found here changes nothing that is loaded."""
    path = checkpoint(tmp_path / "last.ckpt")
    content, whole = path.read_bytes(), torch.load(path, weights_only=True)
    found = 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            verify_checkpoint(path)
        except UserError:
            found += 1
        else:
            loaded = torch.load(path, weights_only=True)
            assert loaded["epoch"] == whole["epoch"]
            assert all(
                torch.equal(loaded["state_dict"][name], value) for name, value in whole["state_dict"].items()
            )
    assert found > 600


def test_a_bit_that_makes_a_folder_of_the_weights(tmp_path: Path) -> None:
    """Checksums say nothing about it, and torch loads no weights, in silence."""
    path = checkpoint(tmp_path / "last.ckpt")
    content = path.read_bytes()
    place = content.rindex(b"last/data/1") - 8
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(UserError, match=r"damaged \(last/data/1 is marked as a folder\)"):
        verify_checkpoint(path)


def test_what_a_flipped_bit_in_the_weights_does_without_this(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "last.ckpt")
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(
            next(name for name in archive.namelist() if name.endswith("data/1"))
        ).header_offset
    content = path.read_bytes()
    place += 200
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    torch.load(path, weights_only=True)
    check_checkpoint(path, "name")
    with pytest.raises(
        UserError, match=r"damaged \(Bad CRC-32 for file .*\): restore it .* nothing has been changed$"
    ):
        verify_checkpoint(path)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000004"
    checkpoint(folder / "meta.pt")
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (folder / name).write_bytes(os.urandom(100))
    verify_checkpoint(folder)
    record_sizes(folder)
    verify_checkpoint(folder)
    (folder / "__1_0.distcp").write_bytes(b"half")
    with pytest.raises(
        UserError, match=r"step-00000004 is damaged \(__1_0\.distcp gone or cut short\): restore it"
    ):
        verify_checkpoint(folder)
    (folder / "meta.pt").unlink()
    with pytest.raises(UserError, match="is no checkpoint, or was cut short"):
        check_checkpoint(folder, "name")
