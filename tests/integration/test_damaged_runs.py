"""Two runs in one folder, full disks, and files that are damaged or gone: an error that says what to do, or a repair.

Each harm is done to a real run that was interrupted; one that is repaired ends as the run that was not.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks import SelfPlayCallback
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.resume.checkpoints import verify_checkpoint
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.lock import RunLock
from sppo_lightning.types import PhaseProgress

Arguments = Callable[..., list[str]]
Harm = Callable[[Path], None]


class InterruptedRunError(RuntimeError):
    """Stands for whatever ends a run."""


class StopAt(SelfPlayCallback):
    """Ends the run at ``point``: the iteration, the phase or ``training``, and the phase before it."""

    point: tuple[int, str, str] | None = None
    phases = ("", "")  # the last two

    def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
        if progress.phase != self.phases[0]:
            self.phases = (progress.phase, self.phases[0])
        if progress.done and (progress.iteration, *self.phases) == StopAt.point:
            raise InterruptedRunError

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (self_play_data(trainer).current_iteration, "training", self.phases[0]) == StopAt.point:
            raise InterruptedRunError


@pytest.fixture(scope="module")
def arguments(tiny_policy: Path, counting_prompts: Path) -> Arguments:

    def build(root: Path, command: str = "fit", **changes: Any) -> list[str]:
        settings = {
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "trainer__callbacks": '[{"class_path": "sppo_lightning.callbacks.DifficultyReestimation"}, '
            f'{{"class_path": "{__name__}.StopAt"}}]',
            **changes,
        }
        return [command, *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)]

    return build


@contextmanager
def stopping_at(iteration: int, phase: str, *, after: str) -> Iterator[None]:
    StopAt.point = (iteration, phase, after)
    with pytest.raises(InterruptedRunError):
        yield
    StopAt.point = None


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole") / "run"
    main(arguments(root))
    return root


@pytest.fixture(scope="module")
def sampled(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iteration 0 is behind it; iteration 1 has its pairs, and no step was taken."""
    root = tmp_path_factory.mktemp("sampled") / "run"
    with stopping_at(1, "training", after="reference"):
        main(arguments(root))
    return root


@pytest.fixture(scope="module")
def scoring(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iteration 1 is being made: its first shard is scored, its others are not."""
    root = tmp_path_factory.mktemp("scoring") / "run"
    with stopping_at(1, "scoring", after="probing"):
        main(arguments(root))
    return root


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end in one line; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("sppo-lightning: error: ") == 1
    _, _, line = printed.rpartition("sppo-lightning: error: ")
    assert line.count("\n") == 1
    return line.strip()


def content(root: Path) -> dict[str, bytes]:
    """All that a run has stored; its folder's name stands in its config."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name not in (".lock", "config.yaml")]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    found = [*root.glob("iterations/**/*.parquet"), *root.glob("evaluations/**/*.parquet")]
    return {str(path.relative_to(root)): pq.read_table(path, partitioning=None).to_pylist() for path in found}


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    first, second = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, other))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    """One bit in the middle of the data; in a manifest, of a fingerprint."""
    data = bytearray(path.read_bytes())
    place = data.index(b'_fingerprint": "') + 20 if path.suffix == ".json" else len(data) // 3
    data[place] ^= 1
    path.write_bytes(bytes(data))


def poison(path: Path) -> None:
    """A token id that no policy has, in a good file."""
    table = pq.read_table(path, partitioning=None)
    for number, name in enumerate(table.column_names):
        if name in ("token_ids", "rejected_token_ids"):
            lists = table[name].to_pylist()
            lists[-1][-1] = 10**6
            table = table.set_column(
                number, table.schema.field(name), pa.array(lists, table.schema.field(name).type)
            )
    pq.write_table(table, path)


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# -------------------------------------------------------------------- repairs

REPAIRED: list[Any] = [  # stage, file, harm
    ("sampled", "iterations/001/pairs.parquet", cut),
    ("sampled", "iterations/001/pairs.parquet", delete),
    pytest.param("sampled", "iterations/001/pairs.parquet", poison, marks=pytest.mark.slow),
    ("sampled", "iterations/001/rollouts/probe-00001.parquet", poison),
    ("sampled", "iterations/001/difficulty.parquet", flip),
    pytest.param("sampled", "iterations/001/rollouts/probe-00001.parquet", flip, marks=pytest.mark.slow),
    ("sampled", "iterations/001/rollouts/topup-00000.parquet", delete),
    ("sampled", "evaluations/000/manifest.json", flip),
    pytest.param("sampled", "evaluations/000/rollouts.parquet", delete, marks=pytest.mark.slow),
    ("scoring", "iterations/001/rollouts/probe-00000.parquet", flip),
    pytest.param("scoring", "iterations/001/rollouts/probe-00000.parquet", poison, marks=pytest.mark.slow),
    pytest.param("scoring", "iterations/001/rollouts/probe-00002.parquet", flip, marks=pytest.mark.slow),
    ("scoring", "iterations/001/rollouts/probe-00001.parquet", delete),
]


@pytest.mark.parametrize(("stage", "name", "harm"), REPAIRED)
def test_what_can_be_made_again_is(
    stage: str,
    name: str,
    harm: Harm,
    whole: Path,
    arguments: Arguments,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = copied(request.getfixturevalue(stage), tmp_path)
    harm(root / name)
    harmed = (root / name).read_bytes() if (root / name).exists() else None
    main(arguments(root))
    aside = root / f"{name}.damaged"
    if harmed is not None:
        assert aside.read_bytes() == harmed
        assert any(f"kept as {aside.name} and made anew" in message for message in caplog.messages)
    assert_same_run(whole, root)


def test_answers_of_a_policy_that_has_moved_on_are_left_out(
    sampled: Path, whole: Path, arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copied(sampled, tmp_path)
    cut(root / "evaluations/001/rollouts.parquet")
    main(arguments(root))
    assert any("001/rollouts.parquet is damaged" in text and "left out" in text for text in caplog.messages)
    shutil.copy(whole / "evaluations/001/rollouts.parquet", root / "evaluations/001/rollouts.parquet")
    assert_same_run(whole, root)


# --------------------------------------------------------------------- errors

REFUSED: list[tuple[str, Harm, str]] = [
    (
        "iterations/000",
        delete,
        "000 is gone or incomplete although iteration 1 was made after it: restore it, or",
    ),
    (
        "iterations/000/manifest.json",
        delete,
        "000 is gone or incomplete although iteration 1 was made after it",
    ),
    (
        "iterations/000/manifest.json",
        flip,
        "000/manifest.json is damaged (its content and its digest differ), and",
    ),
    (
        "iterations/000/rollouts/probe-00001.parquet",
        delete,
        "responses that manifest.json counts: restore its files",
    ),
    ("iterations/000/rollouts/probe-00001.parquet", cut, "probe-00001.parquet is damaged ("),
    ("iterations/000/pairs.parquet", cut, "000/pairs.parquet is damaged ("),
    (
        "iterations/000/pairs.parquet",
        poison,
        "000/pairs.parquet holds the token id 1000000, but the policy has ids",
    ),
    (
        "iterations/000/pairs.parquet",
        delete,
        "000/pairs.parquet is gone: restore it from a copy, or give the same",
    ),
    (
        "iterations/000/difficulty.parquet",
        delete,
        "000/difficulty.parquet is gone: restore it from a copy, or give",
    ),
    (
        "iterations/001/manifest.json",
        delete,
        "001 holds rollouts but no manifest.json, so nothing says which policy",
    ),
    ("iterations/001/manifest.json", cut, "001/manifest.json is damaged ("),
    (
        "checkpoints/last.ckpt",
        cut,
        "last.ckpt' is no checkpoint, or was cut short: restore it from a copy, or name",
    ),
    ("checkpoints/last.ckpt", flip, "last.ckpt is damaged (Bad CRC-32 for file "),
    (
        "checkpoints/last.ckpt",
        delete,
        "last.ckpt is gone, and iterations/001 was sampled from the policy that it",
    ),
    (
        "config.yaml",
        delete,
        "holds a run, but its config.yaml is gone: restore it from a copy, or, if you are sure",
    ),
]


@pytest.mark.parametrize(("name", "harm", "wording"), REFUSED)
def test_what_cannot_is_an_error_and_nothing_is_changed(
    name: str,
    harm: Harm,
    wording: str,
    sampled: Path,
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = copied(sampled, tmp_path)
    harm(root / name)
    before = content(root)
    assert wording in refused(arguments(root), capsys)
    assert content(root) == before


def test_a_restored_file_lets_the_run_go_on(
    sampled: Path, whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(sampled, tmp_path)
    flip(root / "checkpoints/last.ckpt")
    refused(arguments(root), capsys)
    shutil.copy(sampled / "checkpoints/last.ckpt", root / "checkpoints/last.ckpt")
    main(arguments(root))
    assert_same_run(whole, root)


def test_a_lost_config_is_written_as_the_error_says(
    sampled: Path, whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(sampled, tmp_path)
    (root / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        main([*arguments(root), "--print_config"])
    (root / "config.yaml").write_text(capsys.readouterr().out)
    other = [*arguments(root), "--model.learning_rate=0.5"]
    assert "holds a run with model.learning_rate=0.001, but this config has 0.5" in refused(other, capsys)
    main(arguments(root))
    assert_same_run(whole, root)


# ------------------------------------------------------------- one run at a time


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_folder_in_use_is_left_alone(
    command: str, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by the commands that write evaluations: the run writes there too."""
    root = tmp_path / "run"
    with RunLock(RunFolder(root).lock):
        line = refused(arguments(root, command), capsys)
        assert f"{root} is in use by another run (process " in line
        assert line.endswith("): wait until it has ended, or use another trainer.default_root_dir")
        assert content(root) == {}


def test_a_folder_is_free_once_its_run_has_ended_also_by_an_error(
    sampled: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(sampled, tmp_path)
    cut(root / "checkpoints/last.ckpt")
    for _ in range(2):
        assert "was cut short" in refused(arguments(root), capsys)
    with RunLock(RunFolder(root).lock) as lock:
        assert lock.held


def test_what_a_killed_run_left_is_removed_and_stored_shards_are_not(
    scoring: Path, whole: Path, arguments: Arguments, tmp_path: Path
) -> None:
    root = copied(scoring, tmp_path)
    leftovers = [
        root / "iterations/001/rollouts/.probe-00001.parquet.1.tmp",
        root / "checkpoints/.last.ckpt.1.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half a file")
    main(arguments(root))
    assert not any(path.exists() for path in leftovers)
    assert_same_run(whole, root)


# --------------------------------------------------------------------- resuming


def test_never_and_must(
    sampled: Path, whole: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(sampled, tmp_path)
    before = content(root)
    never = refused(arguments(root, data__resume="never"), capsys)
    assert never.startswith(
        f"data.resume=never, but {root} holds a run: use another trainer.default_root_dir, or"
    )
    must = refused(arguments(tmp_path / "new", data__resume="must"), capsys)
    assert must.startswith(
        f"data.resume=must, but there is no {tmp_path / 'new/checkpoints/last.ckpt'}: check"
    )
    assert content(root) == before
    assert content(tmp_path / "new") == {}
    main(arguments(root, data__resume="must"))
    assert_same_run(whole, root)


# ---------------------------------------------------------------------- the disk


@pytest.mark.filterwarnings("ignore:.*report.html could not be written")  # it is larger than the files here
@pytest.mark.parametrize(
    "name",
    ["evaluations/000/rollouts.parquet", pytest.param("checkpoints/last.ckpt", marks=pytest.mark.slow)],
)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    name: str,
    whole: Path,
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No file may be larger than one of the run's, which the kernel refuses as it does on a full disk."""
    root = tmp_path / "run"
    limit = (whole / name).stat().st_size - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refused(arguments(root, "fit"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # of an evaluation, its parts come first
    place = root / name if name.endswith(".ckpt") else root / "evaluations/000"
    assert line.startswith(str(place))
    assert " cannot be written (File too large; " in line
    assert line.endswith(
        " MB free): make room, then give the same command again: it resumes from what is stored"
    )
    if name.endswith(".ckpt"):
        verify_checkpoint(root / name)  # the one before, which was smaller
    else:
        assert not (root / name).exists()
    assert not list(root.rglob("*.tmp"))
    main(arguments(root))
    assert_same_run(whole, root)
