"""One run at a time in a folder: real processes, real kills."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sppo_lightning.system.lock import RunLock, check_ranks, is_first_process
from sppo_lightning.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from sppo_lightning.system.lock import RunLock
with RunLock(Path(sys.argv[1]) / ".lock"):
    {inside}
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(root: Path, inside: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    code = HOLD.format(inside=inside)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_another_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with holder(root) as process:
        message = (
            rf"^{re.escape(str(root))} is in use by another run \(process {process.pid} on "
            rf"{re.escape(os.uname().nodename)}, since [-\d]+ [:\d]+ [+-]\d+\): wait until it has ended, "
            r"or use another trainer\.default_root_dir$"
        )
        lock = RunLock(root / ".lock")
        with pytest.raises(UserError, match=message):
            lock.acquire()
        assert not lock.held
        lock.release()  # nothing to give back
        with pytest.raises(UserError, match=message):
            RunLock(root / ".lock").acquire()
        assert [path.name for path in root.iterdir()] == [".lock"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_lock(tmp_path: Path, how: signal.Signals) -> None:
    with holder(tmp_path) as process:
        process.send_signal(how)
        process.wait()
        with RunLock(tmp_path / ".lock") as lock:
            assert lock.held
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(
    "inside",
    [
        "import subprocess; print(subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL).pid)",
        "import subprocess; print(subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL, close_fds=False).pid)",
        "import os\n    heard, say = os.pipe()\n    pid = os.fork()\n"
        "    if pid == 0: os.write(say, b'1'); time.sleep(30)\n    os.read(heard, 1)\n    print(pid)",
    ],
    ids=["subprocess", "open files", "fork"],
)
def test_a_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path, inside: str) -> None:
    code = HOLD.format(inside=inside).replace("print(pid)", "print(pid, flush=True)")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="is in use by another run"):
                RunLock(tmp_path / ".lock").acquire()
            process.kill()
            process.wait()
            os.kill(child, 0)  # is there
            with RunLock(tmp_path / ".lock") as lock:
                assert lock.held
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()


def test_a_released_folder_is_free_for_this_process_too(tmp_path: Path) -> None:
    with RunLock(tmp_path / ".lock"), pytest.raises(UserError, match="is in use by another run"):
        RunLock(tmp_path / ".lock").acquire()
    assert (tmp_path / ".lock").read_text() == ""
    for _ in range(2):
        with RunLock(tmp_path / ".lock") as lock:
            assert lock.held
        assert not lock.held
    with pytest.raises(KeyError), RunLock(tmp_path / ".lock"):
        raise KeyError
    RunLock(tmp_path / ".lock").acquire()


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe", "text"])
def test_what_no_run_has_written_is_not_emptied(tmp_path: Path, kind: str) -> None:
    """A run folder may come from somebody else, with a ``.lock`` that stands for another file."""
    other, lock = tmp_path / "thesis.tex", tmp_path / "run" / ".lock"
    other.write_text("ten years")
    lock.parent.mkdir()
    why = {
        "link": "a link",
        "dangling": "a link",
        "hard link": "another name of a file that lies elsewhere",
        "folder": "no file",
        "pipe": "no file",
        "text": "not written by a run",
    }[kind]
    {
        "link": lambda: lock.symlink_to(other),
        "dangling": lambda: lock.symlink_to(tmp_path / "fresh"),
        "hard link": lambda: lock.hardlink_to(other),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
        "text": lambda: lock.write_text("ten years"),
    }[kind]()
    message = rf"^{re.escape(str(lock))} is {why}: remove it, or use another trainer\.default_root_dir$"
    with pytest.raises(UserError, match=message):
        RunLock(lock).acquire()
    assert other.read_text() == "ten years"
    assert not (tmp_path / "fresh").exists()
    assert kind != "text" or lock.read_text() == "ten years"


@pytest.mark.parametrize(
    "content", [b"process 7 on host, since 2026-01-01 00:00:00 +0000\n", b"\0" * 40, b""]
)
def test_the_file_of_a_killed_run_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with RunLock(tmp_path / ".lock") as lock:
        assert lock.held


def test_other_folders_are_free(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / ".lock"), RunLock(tmp_path / "b" / ".lock") as other:
        assert other.held


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """The machine's own file systems can all lock."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path / ".lock") as lock:
        assert not lock.held
    assert caplog.messages == [
        f"{tmp_path} lies on a file system without locks ({os.strerror(code)}): see to it that one run at a time "
        "writes there"
    ]


def test_taking_a_free_lock_is_quick(tmp_path: Path) -> None:
    start = time.perf_counter()
    for _ in range(100):
        with RunLock(tmp_path / ".lock"):
            pass
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),  # torchrun
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, True),  # srun
        ({"SLURM_PROCID": "3", "SLURM_NODEID": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),  # started by the first process
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"NODE_RANK": "1"}, False),  # the same command on a second machine
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_who_leads_a_run(environment: dict[str, str], first: bool) -> None:
    assert is_first_process(environment) is first


@pytest.mark.parametrize(
    ("environment", "nodes", "wording"),
    [
        (
            {"RANK": "1"},
            1,
            r"^RANK=1 is set in the environment, .* \(TORCHELASTIC_RUN_ID is not set\): unset RANK, or",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, r"^RANK=1 is set"),  # Lightning does not take it up
        ({"LOCAL_RANK": "1"}, 1, r"^LOCAL_RANK=1 is set .* \(MASTER_PORT is not set\)"),
        ({"SLURM_PROCID": "2"}, 1, r"^SLURM_PROCID=2 is set .* \(SLURM_NTASKS is not set\)"),
        ({"NODE_RANK": "1"}, 1, r"^NODE_RANK=1 is set .* \(trainer\.num_nodes=1\)"),
        ({"RANK": "one"}, 1, r"^RANK='one' is no number: unset that environment variable$"),
        ({"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0"}, 1, None),
        (
            {
                "RANK": "8",
                "LOCAL_RANK": "1",
                "GROUP_RANK": "1",
                "TORCHELASTIC_RUN_ID": "x",
                "WORLD_SIZE": "9",
            },
            2,
            None,
        ),
        ({"LOCAL_RANK": "1", "MASTER_PORT": "2"}, 1, None),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 1, None),
        ({"NODE_RANK": "1"}, 2, None),
    ],
)
def test_a_rank_that_another_job_left(environment: dict[str, str], nodes: int, wording: str | None) -> None:
    if wording is None:
        check_ranks(environment, nodes=nodes)
        return
    with pytest.raises(UserError, match=wording):
        check_ranks(environment, nodes=nodes)
