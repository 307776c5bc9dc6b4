"""Files that are whole or absent: after a crash, on a full disk, and where a file is damaged."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crash import CrashError

from sppo_lightning.store.run_folder import RunFolder, remove_leftovers
from sppo_lightning.system.durable import (
    changed_files,
    disk_error,
    quarantine,
    read_checksummed,
    record_sizes,
    replacing,
    with_checksum,
    write_atomically,
)
from sppo_lightning.types import UserError

NOBODY = 65534
FULL = Path("/dev/full")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------- crashes


def test_a_crash_leaves_the_old_file_whole(tmp_path: Path, crash: Callable[[], None]) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    crash()
    with pytest.raises(CrashError):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_crash_leaves_no_new_file(tmp_path: Path, crash: Callable[[], None]) -> None:
    (tmp_path / "new").mkdir()
    crash()
    with pytest.raises(CrashError):
        write_atomically(tmp_path / "new" / "file", b"half")
    assert names(tmp_path / "new") == []


def test_bytes_are_on_disk_before_the_name_is_and_the_name_before_the_call_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of new folders too: each name is put on disk in the folder that holds it, from the inside out."""
    path, seen = tmp_path / "a" / "b" / "file", []

    def record(descriptor: int) -> None:
        found = os.fstat(descriptor)
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        seen.append((place if stat.S_ISDIR(found.st_mode) else found.st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(path, b"12345")
    assert seen == [(tmp_path / "a", False), (tmp_path, False), (5, False), (path.parent, True)]
    seen.clear()
    write_atomically(path, b"1234567")
    assert seen == [(7, True), (path.parent, True)]
    assert path.read_bytes() == b"1234567"
    assert names(path.parent) == ["file"]


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


# ------------------------------------------------------------------- the disk


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_atomically(path, b"old")
    (tmp_path / f".shard.parquet.{os.getpid()}.tmp").symlink_to(FULL)
    message = (
        rf"^{re.escape(str(path))} cannot be written \(No space left on device; [\d,]+ MB free\): make room, then "
        "give the same command again: it resumes from what is stored$"
    )
    with pytest.raises(UserError, match=message):
        write_atomically(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["shard.parquet"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not write."""
    folder = tmp_path / "locked"
    folder.mkdir()
    write_atomically(folder / "file", b"old")
    folder.chmod(0o555)
    if os.geteuid() != 0:
        yield folder
    else:  # root may write anywhere
        os.seteuid(NOBODY)
        yield folder
        os.seteuid(0)
    folder.chmod(0o755)


@pytest.mark.parametrize("name", ["file", "fresh", "new/file"])
def test_a_folder_that_may_not_be_written_is_named(locked: Path, name: str) -> None:
    message = (
        rf"{re.escape(str(locked / name))} cannot be read or written \(Permission denied\): mend its folder "
    )
    with pytest.raises(UserError, match=message):
        write_atomically(locked / name, b"new")


@pytest.mark.parametrize(
    ("code", "wording"),
    [
        (errno.ENOSPC, r"f cannot be written \(No space left on device; [\d,]+ MB free\): make room"),
        (errno.EDQUOT, r"f cannot be written \(Disk quota exceeded; [\d,]+ MB free\): make room"),
        (errno.EROFS, r"f cannot be read or written \(Read-only file system\): mend its folder"),
        (errno.EIO, r"f cannot be read or written \(Input/output error\): mend its folder"),
    ],
)
def test_what_a_disk_says(tmp_path: Path, code: int, wording: str) -> None:
    message = disk_error(OSError(code, os.strerror(code)), tmp_path / "gone" / "f")
    assert re.search(wording, str(message))


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), OSError("no number"), ValueError("28")])
def test_other_errors_are_left_alone(tmp_path: Path, error: Exception) -> None:
    assert disk_error(error, tmp_path) is None
    with pytest.raises(type(error)) as found, replacing(tmp_path / "file"):
        raise error
    assert found.value is error
    assert names(tmp_path) == []


# ------------------------------------------------------------ leftovers, damage


def test_leftovers_of_a_killed_run_go_and_nothing_else(tmp_path: Path) -> None:
    kept = ["config.yaml", ".lock", "iterations/000/rollouts/probe-00000.parquet", "policy/.model.1.tmp"]
    kept += [
        "iterations/000/rollouts/probe-00001.parquet.damaged",
        "checkpoints/last.ckpt",
        "export-hf/.x.tmp",
    ]
    gone = [".metrics.csv.12.tmp", "checkpoints/.last.ckpt.12.tmp", "checkpoints/.shards.7.tmp/0.distcp"]
    gone += ["iterations/000/.manifest.json.12.tmp", "iterations/001/rollouts/.probe-00000.parquet.3.tmp"]
    gone += [
        "evaluations/000/.rollouts.parquet.1.tmp",
        "evaluations/001/parts-ab/.greedy-00000.parquet.1.tmp",
    ]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert len(remove_leftovers(RunFolder(tmp_path))) == len(gone)
    assert sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    ) == sorted(kept)
    assert remove_leftovers(RunFolder(tmp_path)) == []
    assert remove_leftovers(RunFolder(tmp_path / "no such folder")) == []


def test_a_damaged_file_is_kept_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("first", "second", "third"):
        (tmp_path / "a.parquet").write_text(content)
        quarantine(tmp_path / "a.parquet")
    assert names(tmp_path) == ["a.parquet.damaged", "a.parquet.damaged-2", "a.parquet.damaged-3"]
    assert (tmp_path / "a.parquet.damaged").read_text() == "first"
    assert (tmp_path / "a.parquet.damaged-3").read_text() == "third"
    assert (
        caplog.messages[0]
        == f"{tmp_path / 'a.parquet'} is damaged: it is kept as a.parquet.damaged and made anew"
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(content=st.dictionaries(st.text(max_size=5).filter(lambda key: key != "digest"), JSON, max_size=4))
def test_checksummed_content_comes_back(content: dict[str, object]) -> None:
    assert read_checksummed(with_checksum(content)) == content


def test_no_flipped_bit_of_checksummed_content_goes_unnoticed() -> None:
    content = {"policy_fingerprint": "ab12", "smoothing": 0.25, "dropped": {"too_long": 2}}
    whole = with_checksum(content)
    for position in range(len(whole)):
        flipped = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        try:
            found = read_checksummed(flipped)
        except ValueError:
            continue
        assert {name: found[name] for name in content} == content  # a blank, or the digest's own name


def test_keys_that_are_numbers_become_text() -> None:
    assert read_checksummed(with_checksum({"counts": {2: 1, 10: 2}, "pair": (1, 2)})) == {
        "counts": {"2": 1, "10": 2},
        "pair": [1, 2],
    }


def test_content_without_a_digest_is_taken_as_it_is() -> None:
    """Files that were written before files had one."""
    assert read_checksummed(b'{"complete": true}') == {"complete": True}


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff\xfe", b'{"a": 1, "digest": "0"}'])
def test_damaged_content_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_checksummed(content)


def test_files_that_are_gone_or_cut_short_are_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("12345")
    assert changed_files(tmp_path) is None
    record_sizes(tmp_path)
    assert changed_files(tmp_path) is None
    (tmp_path / "b").write_text("123")
    (tmp_path / "c").unlink()
    assert changed_files(tmp_path) == "b, c gone or cut short"
    (tmp_path / "sizes.json").write_text("{")
    assert str(changed_files(tmp_path)).startswith("sizes.json: ")
