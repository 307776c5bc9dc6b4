"""Checkpoints on disk: there is a whole one at any moment, whatever ends the process."""

from __future__ import annotations

import os
import pickle
import re
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crashing import Change, watch
from torch.distributed.checkpoint import save

from sppo_lightning.resume.checkpoints import (
    DurableCheckpointIO,
    check_checkpoint,
    sharded_path,
    switch_to_sharded,
)
from sppo_lightning.types import UserError

SHARDS = ("__0_0.distcp", "__1_0.distcp", ".metadata")


def in_another_process(act: Callable[[], None]) -> int:
    """Act in a forked process; return its exit status, negative after a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_at_each_change(root: Path, act: Callable[[], None], check: Callable[[int], None]) -> int:
    """Have ``act`` killed before each change that it makes; return how many there are.

    Args:
        root: where changes count.
        act: starts from what the kill before has left.
        check: called after each kill, with its number.
    """
    point = 0

    def killed() -> None:
        left = point

        def tell(change: Change) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        watch(root, tell)
        act()

    while (status := in_another_process(killed)) == -signal.SIGKILL:
        check(point)
        point += 1
    assert status == 0
    return point


# ------------------------------------------------------------------- one file


def test_a_checkpoint_is_whole_at_any_moment(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    writer = DurableCheckpointIO()
    writer.save_checkpoint({"weight": torch.arange(3)}, last)

    def write() -> None:
        writer.save_checkpoint({"weight": torch.arange(5)}, last)

    def is_the_old_one(point: int) -> None:
        assert torch.load(last, weights_only=True)["weight"].tolist() == [0, 1, 2]

    assert ended_at_each_change(tmp_path, write, is_the_old_one) == 2  # opened and renamed
    assert torch.load(last, weights_only=True)["weight"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limit", [0, 100, 5_000, 399_000, 402_000])
def test_a_full_disk_is_told_and_the_old_checkpoint_stays(tmp_path: Path, limit: int) -> None:
    """At any byte: behind the first write that fails, torch's archive complains of something else."""
    last = tmp_path / "last.ckpt"
    writer = DurableCheckpointIO()
    writer.save_checkpoint({"weight": torch.arange(3)}, last)
    told = tmp_path / "told"

    def write() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            writer.save_checkpoint({"weight": torch.zeros(100_000), "more": [1] * 2000}, last)
        except UserError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            told.write_text(str(error))

    assert in_another_process(write) == 0
    assert re.match(
        rf"{last} cannot be written \(File too large; [\d,]+ MB free\): make room, then give the same command",
        told.read_text(),
    )
    told.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(last, weights_only=True)["weight"].tolist() == [0, 1, 2]


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        DurableCheckpointIO().save_checkpoint({"rule": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------- many files


def write_shards(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    for name in SHARDS:
        (folder / name).write_text(content)
    return folder


def contents(last: Path) -> set[str]:
    assert {path.name for path in last.iterdir()} == {*SHARDS, "sizes.json"}
    return {(last / name).read_text() for name in SHARDS}


def test_the_last_checkpoint_is_a_relative_link(tmp_path: Path) -> None:
    """So that a run folder may be moved."""
    last = tmp_path / "run" / "last.ckpt"
    switch_to_sharded(last, write_shards(sharded_path(last, 7), "seven"))
    assert os.readlink(last) == "step-00000007"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert contents(tmp_path / "moved" / "last.ckpt") == {"seven"}


def test_a_folder_of_the_same_step_is_not_written_over(tmp_path: Path) -> None:
    """An iteration's end may be saved behind its last step, whose folder ``last.ckpt`` points to."""
    last = tmp_path / "last.ckpt"
    for content in ("trained", "ended", "trained again"):
        shards = sharded_path(tmp_path / "last.ckpt", 7)
        assert not shards.exists()
        if last.exists():
            assert shards != last.resolve()
        switch_to_sharded(last, write_shards(shards, content))
        assert contents(last) == {content}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", shards.name]


def test_what_a_killed_run_has_left_gives_way(tmp_path: Path) -> None:
    write_shards(tmp_path / "step-00000007", "half")
    assert not sharded_path(tmp_path / "last.ckpt", 7).exists()


def test_the_last_checkpoint_replaces_a_file(tmp_path: Path) -> None:
    """A run that went on with another strategy."""
    last = tmp_path / "last.ckpt"
    last.write_text("a file")
    switch_to_sharded(last, write_shards(sharded_path(tmp_path / "last.ckpt", 7), "seven"))
    assert contents(last) == {"seven"}


def test_a_whole_checkpoint_is_there_at_any_moment(tmp_path: Path) -> None:
    """Killed before each change of a save, each time going on from what the kill before has left."""
    last = tmp_path / "last.ckpt"
    switch_to_sharded(last, write_shards(sharded_path(tmp_path / "last.ckpt", 3), "old"))

    def save() -> None:
        switch_to_sharded(last, write_shards(sharded_path(tmp_path / "last.ckpt", 5), "new"))

    seen: list[str] = []

    def is_whole(point: int) -> None:
        (content,) = contents(last)
        seen.append(content)

    changes = ended_at_each_change(tmp_path, save, is_whole)
    assert changes > 10
    assert seen == sorted(seen, reverse=True)  # the old one, and from some change on the new one
    assert set(seen) == {"old", "new"}
    assert contents(last) == {"new"}
    assert len(list(tmp_path.glob("step-*"))) == 1
    assert not list(tmp_path.glob(".*"))


class _Touch:
    """Unpickled, it runs what its maker wants."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sharded_by_torch(folder: Path) -> Path:
    """What ``torch.distributed.checkpoint`` writes of a model and its optimizer."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2).bfloat16(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process, which is no cluster
        save(state, checkpoint_id=folder)
    torch.save({"epoch": 1}, folder / "meta.pt")
    return folder


def test_a_sharded_checkpoint_of_torch_is_accepted(tmp_path: Path) -> None:
    check_checkpoint(sharded_by_torch(tmp_path / "step-1"), "ckpt_path")


@pytest.mark.parametrize("content", ["code", "text", "cut"])
def test_metadata_that_would_run_code_is_refused(tmp_path: Path, content: str) -> None:
    """``torch`` unpickles it with all that Python can do."""
    folder = sharded_by_torch(tmp_path / "step-1")
    metadata = folder / ".metadata"
    code, cut = pickle.dumps(_Touch(tmp_path / "made")), metadata.read_bytes()[:-20]
    metadata.write_bytes({"code": code, "text": b"no pickle", "cut": cut}[content])
    why = {"code": r"it names posix\.mkdir, which no checkpoint holds"}.get(content, ".*")
    with pytest.raises(UserError, match=rf"^{re.escape(str(metadata))} is damaged \({why}\): restore it"):
        check_checkpoint(folder, "ckpt_path")
    assert not (tmp_path / "made").exists()
