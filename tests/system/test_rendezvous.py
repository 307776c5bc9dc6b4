"""Processes that meet through files: real ones, that wait, fail and are killed."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.processes import PROCESSES

from sppo_lightning.system.rendezvous import FileRanks, open_session
from sppo_lightning.types import UserError

BEAT_S = 0.1
SESSIONS = ".rendezvous"
KINDS: list[Any] = [
    *(None, True, 7, -(2**70), 2.5, math.inf, "naïve\n", "", b"\x00\xff"),
    *((), (1, None, ("a", (2.0,))), [], [[1], (2, [3])], {}, {"a": {1: (None, True)}, (1, 2): "key"}),
]


class Outcome(NamedTuple):
    """What a process returned, or the user's error that it ended with."""

    value: Any
    error: str | None
    seconds: float


def in_process(
    work: Callable[[FileRanks], Any], results: Connection, folder: Path, options: dict[str, Any]
) -> None:
    begun = time.monotonic()
    value, error = None, None
    ranks = FileRanks(folder, beat_s=BEAT_S, **options)
    try:
        value = work(ranks)
    except UserError as raised:
        error = str(raised)
        ranks.fail(error)
    seconds = time.monotonic() - begun
    ranks.close()
    results.send(Outcome(value, error, seconds))


def started(
    work: Callable[[FileRanks], Any], folder: Path, rank: int, *, world_size: int = 2, **options: Any
) -> tuple[BaseProcess, Connection]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    options |= {"rank": rank, "world_size": world_size}
    process = PROCESSES.Process(target=in_process, args=(work, theirs, folder, options), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is the end of the pipe
    return process, ours


def ended(process: BaseProcess, results: Connection) -> Outcome:
    assert results.poll(20), "the process hangs"
    outcome: Outcome = results.recv()
    process.join()
    return outcome


def together(
    work: Callable[[FileRanks], Any], folder: Path, *, world_size: int = 2, **options: Any
) -> list[Outcome]:
    """Run ``work`` in real processes; return what became of it, in rank order."""
    begun = [started(work, folder, rank, world_size=world_size, **options) for rank in range(world_size)]
    return [ended(*each) for each in begun]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / SESSIONS / "session"


# ---------------------------------------------------------------------- meetings


def late_second(ranks: FileRanks) -> list[tuple[float, float]]:
    times = []
    for _ in range(3):
        time.sleep(0.7 * ranks.rank)
        came = time.monotonic()
        ranks.barrier("again")
        times.append((came, time.monotonic()))
    return times


def test_a_barrier_holds_under_uneven_load(folder: Path) -> None:
    """The same name three times; the late one works longer than the patience, and is alive."""
    outcomes = together(late_second, folder, patience_s=0.4)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for times in zip(*(outcome.value for outcome in outcomes), strict=True):
        assert min(left for _, left in times) >= max(came for came, _ in times)
    assert not folder.exists(), "rank zero removes the session"
    assert not folder.parent.exists()


def exchange(ranks: FileRanks) -> dict[str, Any]:
    own = torch.arange(4, dtype=torch.float64).reshape(2, 2) * ranks.rank
    own[0, 0] = math.nan
    sides = ranks.gather([own, ranks.rank, KINDS])
    part = ranks.gather([torch.zeros(1_000_000, requires_grad=True)[3:5]])
    written = 0
    for path in folder_files(ranks):
        with suppress(FileNotFoundError):  # another process may be through with it
            written = max(written, path.stat().st_size if path.name.startswith("gather-") else 0)
    uneven = ranks.gather(list(range(ranks.rank)))
    values = [ranks.same(value if ranks.rank == 0 else "not mine") for value in KINDS]
    verdict = ranks.same(("refused", torch.tensor([ranks.rank + 0.5])))
    return {
        "tensors": [side[0].tolist() for side in sides],
        "dtypes": {side[0].dtype for side in sides},
        "order": [side[1] for side in sides],
        "gathered": [side[2] for side in sides],
        "part": [side[0].tolist() for side in part],
        "written": written,
        "uneven": uneven,
        "same": values,
        "verdict": (verdict[0], verdict[1].tolist()),
    }


def folder_files(ranks: FileRanks) -> list[Path]:
    return list(ranks.folder.iterdir())


def test_what_is_sent_arrives(folder: Path) -> None:
    """All kinds of values, with their types: a tuple stays a tuple."""
    outcomes = together(exchange, folder, world_size=3)
    for outcome in outcomes:
        assert outcome.error is None
        found = outcome.value
        assert repr(found["tensors"]) == repr(
            [[[math.nan, 1.0 * rank], [2.0 * rank, 3.0 * rank]] for rank in range(3)]
        )
        assert found["dtypes"] == {torch.float64}
        assert found["order"] == [0, 1, 2]
        assert repr(found["gathered"]) == repr([KINDS] * 3)
        assert found["part"] == [[0.0, 0.0]] * 3
        assert found["written"] < 10_000, "a part of a tensor is sent without the rest"
        assert found["uneven"] == [[], [0], [0, 1]]
        assert repr(found["same"]) == repr(KINDS)
        assert found["verdict"] == ("refused", [0.5])


def send_a_class(ranks: FileRanks) -> str:
    with pytest.raises(TypeError, match=r"^PosixPath cannot be sent to other processes$"):
        ranks.gather([{"where": [Path("x")]}])
    ranks.barrier("both refused")
    return "refused"


def test_a_value_that_a_reader_would_refuse_is_refused_where_it_is_sent(folder: Path) -> None:
    assert [outcome.value for outcome in together(send_a_class, folder)] == ["refused"] * 2


def different_ways(ranks: FileRanks) -> None:
    ranks.barrier("start")
    if ranks.rank == 0:
        ranks.barrier("scored probe")
    else:
        ranks.gather([1])


def test_processes_at_different_meetings_are_told(folder: Path) -> None:
    first, second = together(different_ways, folder)
    both = [first.error, second.error]
    told = {
        "process 1 has come to gather where process 0 has come to barrier 'scored probe': start all processes with "
        "the same command, config and version of sppo-lightning",
        "process 0 has come to barrier 'scored probe' where process 1 has come to gather: start all processes with "
        "the same command, config and version of sppo-lightning",
    }
    # each finds out by itself, unless the other's reason is there first
    assert any(error in told for error in both)
    assert all(error in told or error.split("failed: ")[1] in told for error in both if error)
    assert all(both)


def meet_often(ranks: FileRanks) -> tuple[int, float]:
    most = 0
    begun = time.monotonic()
    for number in range(200):
        if number % 2:
            ranks.gather([number])
        else:
            ranks.barrier("again")
        most = max(most, len(folder_files(ranks)))
    return most, time.monotonic() - begun


def test_files_do_not_pile_up(folder: Path) -> None:
    """A heartbeat and the files of two all-gathers of each process, and what is being renamed."""
    outcomes = together(meet_often, folder)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert max(outcome.value[0] for outcome in outcomes) <= 2 * 4


def interrupted(ranks: FileRanks) -> float:
    if ranks.rank == 1:
        time.sleep(1.5)
        return 0.0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ranks.barrier("the other never comes")
    return time.monotonic() - begun


def test_a_signal_ends_the_wait(folder: Path) -> None:
    assert together(interrupted, folder)[0].value < 1.0


# ------------------------------------------------------------- failures and deaths


def second_fails(ranks: FileRanks) -> Any:
    ranks.barrier("start")
    if ranks.rank == 1:
        time.sleep(0.3)
        raise UserError("the reward server does not answer\nand more lines")
    if ranks.rank == 0:
        return ranks.barrier("generated probe")
    while True:  # as the collector does between two shards
        ranks.check()
        time.sleep(0.01)


def test_a_failure_ends_the_others(folder: Path) -> None:
    """Those that wait and those that work; they leave no reasons of their own, and the folder stays."""
    outcomes = together(second_fails, folder, world_size=3)
    told = "process 1 failed: the reward server does not answer"
    assert [outcome.error for outcome in outcomes] == [
        told,
        "the reward server does not answer\nand more lines",
        told,
    ]
    assert max(outcome.seconds for outcome in outcomes) < 3.0
    assert [path.name for path in folder.glob("failed-*")] == ["failed-1"]


def second_is_killed(ranks: FileRanks) -> None:
    ranks.barrier("start")
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier("generated probe")


def test_a_killed_process_is_found_by_its_silence(folder: Path) -> None:
    begun = [started(second_is_killed, folder, rank, patience_s=1.0) for rank in range(2)]
    outcome = ended(*begun[0])
    assert (
        outcome.error
        == "process 1 has given no heartbeat for 1 s: the same command resumes from what is stored"
    )
    assert 1.0 < outcome.seconds < 4.0
    begun[1][0].join()
    assert begun[1][0].exitcode == -signal.SIGKILL


def check_until_it_raises(ranks: FileRanks) -> None:
    ranks.barrier("start")
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        ranks.check()
        time.sleep(0.01)


def test_a_process_at_work_finds_the_killed_one_too(folder: Path) -> None:
    begun = [started(check_until_it_raises, folder, rank, patience_s=0.5) for rank in range(2)]
    assert "process 1 has given no heartbeat" in str(ended(*begun[0]).error)


def second_works(ranks: FileRanks) -> None:
    """The first says when it can be suspended; the second works until the first has long been there again."""
    ranks.barrier("start")
    if ranks.rank == 0:
        (ranks.folder.parent / "ready").touch()
    else:
        wait_for(ranks.folder.parent / "resumed")
        time.sleep(1.0)
    ranks.barrier("end")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_run_that_was_suspended_blames_nobody(folder: Path) -> None:
    """Both sleep for longer than the patience; the first that wakes up finds the other as it was before."""
    begun = [started(second_works, folder, rank, patience_s=1.0) for rank in range(2)]
    wait_for(folder.parent / "ready")
    for process, _ in begun:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.3)
    for process, _ in begun:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
    (folder.parent / "resumed").touch()
    assert [ended(*each).error for each in begun] == [None, None]


def second_goes(ranks: FileRanks) -> None:
    ranks.barrier("start")
    if ranks.rank == 0:
        ranks.barrier("the other has gone")


def test_a_process_that_ended_is_not_waited_for(folder: Path) -> None:
    first, second = together(second_goes, folder)
    assert first.error == (
        "process 1 has ended, while process 0 has not: the same command resumes from what is stored"
    )
    assert second.error is None


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
child.wait()
"""
CHILD = """
import os, sys, time
from pathlib import Path
from sppo_lightning.system.rendezvous import FileRanks
ranks = FileRanks(Path(sys.argv[1]), rank=1, world_size=2, parent=os.getppid(), beat_s=0.1)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_worker_ends_when_its_starter_is_killed(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
        starter.kill()
        _, said = starter.communicate(timeout=10)  # until the worker has closed them too
    assert said == "sppo-lightning: process 1 ends: the process that started it is gone\n"
    assert (folder / "failed-1").read_text() == "the process that started it is gone"


def work_on(ranks: FileRanks) -> None:
    time.sleep(20)


def test_an_orphan_ends_as_if_terminated(folder: Path) -> None:
    process, results = started(work_on, folder, 1, parent=os.getpid())  # it is the fork server's child
    with pytest.raises(EOFError):
        ended(process, results)
    process.join()
    assert process.exitcode == 143


# -------------------------------------------------------------------- the folder


def inner_session(ranks: FileRanks) -> tuple[str, list[str]]:
    root = ranks.folder.parent / "root"
    session = open_session(
        root / SESSIONS, rank=ranks.rank, world_size=ranks.world_size, broadcast=ranks.same, patience_s=60
    )
    session.barrier("start")
    inside = sorted(path.name for path in (root / SESSIONS).iterdir())
    session.barrier("looked")
    session.close()
    return session.folder.name, inside


def test_sessions_of_earlier_starts_are_removed_once_they_are_silent(tmp_path: Path) -> None:
    old, young = tmp_path / "root" / SESSIONS / "old", tmp_path / "root" / SESSIONS / "young"
    for earlier, age in ((old, 100), (young, 20)):
        earlier.mkdir(parents=True)
        (earlier / "gather-1-0").touch()
        os.utime(earlier, (time.time() - age,) * 2)
    first, second = together(inner_session, tmp_path / "outer")
    assert first.error is second.error is None
    assert first.value == second.value
    name, inside = first.value
    assert inside == sorted([name, "young"])
    assert [path.name for path in (tmp_path / "root" / SESSIONS).iterdir()] == ["young"]


def test_two_starts_never_share_a_folder(tmp_path: Path) -> None:
    (first, _), (second, _) = (together(inner_session, tmp_path / f"outer-{start}") for start in range(2))
    assert first.value[0] != second.value[0]


def unusable_root(ranks: FileRanks) -> None:
    (ranks.folder.parent / "file").touch()
    root = ranks.folder.parent / "file"
    open_session(root / SESSIONS, rank=ranks.rank, world_size=ranks.world_size, broadcast=ranks.same)


def test_a_folder_that_cannot_be_made_is_told_by_all(tmp_path: Path) -> None:
    for outcome in together(unusable_root, tmp_path / "outer"):
        assert outcome.error == (
            f"the processes of this run cannot meet in {tmp_path / 'file'} (Not a directory): "
            "trainer.default_root_dir must be a folder that all nodes share and may write to"
        )


def no_room(ranks: FileRanks) -> None:
    ranks.barrier("start")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    ranks.gather([torch.zeros(10_000)])


def test_a_file_that_cannot_be_written_is_an_error_with_its_reason(folder: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    for outcome in together(no_room, folder):
        assert "cannot meet in" in str(outcome.error)
        assert "(File too large): trainer.default_root_dir must be" in str(outcome.error)


def test_without_a_shared_folder_the_others_are_never_seen(folder: Path) -> None:
    ranks = FileRanks(folder, rank=0, world_size=2, patience_s=0.4, beat_s=BEAT_S)
    with pytest.raises(UserError) as raised:
        ranks.barrier("start")
    assert str(raised.value) == (
        f"process 0 has seen nothing of process 1 in {folder} for 0.4 s: trainer.default_root_dir must be a folder "
        "that all nodes share and may write to"
    )
    with pytest.raises(UserError, match="has seen nothing of process 1"):
        ranks.check()
    ranks.fail("ends")
    ranks.close()
    ranks.close()


def test_a_folder_that_was_removed_is_an_error(folder: Path) -> None:
    ranks = FileRanks(folder, rank=0, world_size=2, beat_s=BEAT_S)
    ranks.check()
    for path in (*folder.iterdir(), folder):
        path.unlink() if path.is_file() else path.rmdir()
    time.sleep(3 * BEAT_S)
    told = f"^{folder} is gone, in which the processes of this run meet: trainer.default_root_dir must be"
    with pytest.raises(UserError, match=told):
        ranks.check()
    with pytest.raises(UserError, match=told):
        ranks.barrier("start")
    ranks.fail("ends")
    ranks.close()
    assert not folder.exists()


def test_alone_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    threads = threading.active_count()
    ranks = open_session(tmp_path / "never", rank=0, world_size=1, broadcast=lambda told: told)
    ranks.barrier("start")
    value = object()
    assert ranks.gather([value]) == [[value]]
    assert ranks.same(value) is value
    ranks.check()
    assert threading.active_count() == threads
    ranks.fail("nobody to tell")
    ranks.close()
    assert list(tmp_path.iterdir()) == []
