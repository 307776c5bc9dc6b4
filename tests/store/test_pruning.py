"""Old iterations give up their responses, whatever gets in between."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from support.rules import iteration_rules

from sppo_lightning.difficulty import StatisticsTable, empty_difficulty_table
from sppo_lightning.iteration.state import IterationState
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.pruning import prune
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import read_checksummed
from sppo_lightning.system.rendezvous import FileRanks
from sppo_lightning.types import PreferencePair, Rollout, UserError


class CrashError(Exception):
    """The machine went down."""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Three finished iterations of three shards, and one that is being made."""
    folder = RunFolder(tmp_path)
    for number in range(4):
        store = folder.iteration(number)
        for shard in range(3):
            row = Rollout(f"p{shard}", 0, "Q", "A", (5, 1), "stop", float(number))
            store.shards.write("probe", shard, [row])
        store.write_difficulty(StatisticsTable((), empty_difficulty_table().columns), set())
        store.write_pairs(PairTable.collect([PreferencePair("p0", (1,), (2,), (3,), "c", "r", 1, 0)]))
        store.write_manifest({"complete": number < 3, "metrics": {"a": 1.0}, "smoothing": 0.0})
    return folder


def shards(run: RunFolder) -> list[int]:
    """Shards of each iteration."""
    return [len(list(run.iteration(number).shards.folder.glob("*"))) for number in range(4)]


def others(run: RunFolder) -> dict[str, bytes]:
    """All other files."""
    paths = [path for path in run.root.rglob("*") if path.is_file() and path.parent.name != "rollouts"]
    return {str(path.relative_to(run.root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("finished", "keep", "expected"),
    [
        (0, 1, [3, 3, 3, 3]),
        (1, 1, [3, 3, 3, 3]),
        (2, 1, [0, 3, 3, 3]),
        (3, 1, [0, 0, 3, 3]),
        (3, 2, [0, 3, 3, 3]),
        (3, 3, [3, 3, 3, 3]),
        (3, 9, [3, 3, 3, 3]),
        (4, 1, [0, 0, 0, 3]),
    ],
)
def test_the_last_finished_iterations_keep_theirs(
    run: RunFolder, finished: int, keep: int, expected: list[int]
) -> None:
    prune(run, finished, keep)
    assert shards(run) == expected
    assert [run.iteration(number).pruned for number in range(4)] == [count == 0 for count in expected]
    again = others(run)
    prune(run, finished, keep)
    assert others(run) == again


def test_an_unfinished_iteration_is_left_alone(run: RunFolder) -> None:
    prune(run, 9, 1)
    assert shards(run) == [0, 0, 0, 3]
    assert not run.iteration(3).pruned


def test_everything_else_stays(run: RunFolder) -> None:
    before = others(run)
    prune(run, 3, 1)
    after = others(run)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"iterations/000/manifest.json", "iterations/001/manifest.json"}
    for name in changed:
        assert read_checksummed(after[name]) == {**read_checksummed(before[name]), "pruned": True}
    assert not run.iteration(0).shards.folder.exists()
    assert run.iteration(0).complete
    assert len(run.iteration(0).read_pairs()) == 1


@pytest.mark.parametrize("survived", range(7))
def test_what_a_crash_left_is_deleted_the_next_time(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    unlink, done = Path.unlink, []

    def dies(path: Path, missing_ok: bool = False) -> None:
        if len(done) == survived:
            raise CrashError
        done.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        if survived < 6:
            with pytest.raises(CrashError):
                prune(run, 3, 1)
        else:
            prune(run, 3, 1)
    for number, count in enumerate(shards(run)):
        assert run.iteration(number).pruned or count == 3
    prune(run, 3, 1)
    assert shards(run) == [0, 0, 3, 3]


def test_a_half_pruned_iteration_is_finished_though_more_are_kept_now(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(run, 2, 1)
    assert run.iteration(0).shards.folder.exists()
    prune(run, 3, 3)
    assert not run.iteration(0).shards.folder.exists()
    assert shards(run) == [0, 3, 3, 3]


def test_the_manifest_is_on_disk_before_the_first_file_goes(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, seen = Path.unlink, []

    def look(path: Path, missing_ok: bool = False) -> None:
        seen.append(run.iteration(0).pruned)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    prune(run, 2, 1)
    assert seen == [True] * 3


@pytest.mark.parametrize("place", ["rollouts", "000", "iterations"])
def test_nothing_behind_a_link_is_deleted(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    linked = {"rollouts": run.iteration(0).shards.folder, "000": run.iteration(0).folder}.get(
        place, run.iterations
    )
    elsewhere = tmp_path / "elsewhere"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*.parquet")}
    prune(run, 2, 1)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*.parquet")} == before
    assert caplog.messages == [
        f"Iteration 0 keeps its rollouts: {linked} is a link, and nothing is deleted through one"
    ]
    assert not run.iteration(0).pruned


def test_files_that_no_run_writes_stay(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder = run.iteration(0).shards.folder
    (folder / "notes.md").write_text("mine")
    (folder / "probe-00007.parquet").symlink_to(run.root / "elsewhere.parquet")
    (folder / "probe-00008.parquet.damaged-2").touch()
    (folder / ".topup-00001.parquet.77.tmp").touch()
    prune(run, 2, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "probe-00007.parquet"]
    assert caplog.messages == [f"Iteration 0: {folder} stays, since it holds files that no run writes"]
    prune(run, 2, 1)
    assert len(caplog.messages) == 1


def test_pruned_responses_that_are_asked_for_are_an_error(run: RunFolder) -> None:
    prune(run, 3, 1)
    state = IterationState(run, iteration_rules(), epochs=1, ranks=FileRanks(run.root, rank=0, world_size=1))
    state.current = 2
    assert state.difficulty_after(2).prompt_ids == ("p0", "p1", "p2")
    state.current = 1
    message = (
        f"^{re.escape(str(run.iteration(1).shards.folder))} was deleted to save space, but this run resumes from "
        "there: continue from the run's own checkpoints/last.ckpt, or start anew with a larger data.keep_iterations$"
    )
    with pytest.raises(UserError, match=message):
        state.difficulty_after(1)
    with pytest.raises(UserError, match=message):
        state.reopen(embedding_rows=9)
    assert len(run.iteration(1).read_pairs()) == 1


def test_what_was_freed_is_logged(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    freed = sum(path.stat().st_size for path in run.iteration(0).shards.folder.iterdir()) / 1e6
    with caplog.at_level(logging.INFO, "sppo_lightning"):
        prune(run, 2, 1)
        prune(run, 2, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"Iteration 0: deleted 3 rollout files, {freed:.1f} MB (data.keep_iterations=1)"
    ]


def test_what_cannot_be_deleted_ends_no_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unlink, locked = Path.unlink, run.iteration(0).shards.folder

    def refuses(path: Path, missing_ok: bool = False) -> None:
        if path.parent == locked:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        prune(run, 3, 1)
    assert shards(run) == [3, 0, 3, 3]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(
        "Iteration 0 keeps rollouts that cannot be deleted: [Errno 13] Permission denied"
    )
    prune(run, 3, 1)
    assert shards(run) == [0, 0, 3, 3]
