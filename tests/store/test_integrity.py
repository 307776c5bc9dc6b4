"""What of a stored iteration may be made anew, and what is an error; in a whole run in integration/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.difficulty import empty_difficulty_table, estimate_difficulty, reward_statistics
from sppo_lightning.store.integrity import check_iterations, check_trained, quarantine_damaged
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import read_rollouts, write_rollouts
from sppo_lightning.types import PreferencePair, Rollout, UserError

ROWS = 9  # embeddings of the policy
PAIR = PreferencePair("a", (1,), (2,), (3,), "c", "r", 1.0, 0.0)


@dataclass
class Rank:
    """One of two processes; the other has said ``other``."""

    rank: int = 0
    other: Any = None
    world_size: int = 2

    def barrier(self, name: str) -> None: ...

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values]

    def same(self, value: Any) -> Any:
        return value if self.rank == 0 else self.other


def make(folder: RunFolder, number: int, *, complete: bool = True) -> IterationStore:
    """An iteration of two prompts with two responses each, in two shards."""
    store = folder.iteration(number)
    for shard, prompt_id in enumerate("ab"):
        rows = [Rollout(prompt_id, n, "say it", "well" * 9, (5, 1), "stop", n / 2) for n in range(2)]
        store.shards.write("probe", shard, rows)
    table = estimate_difficulty(
        reward_statistics({"a": [1.0], "b": [0.5]}), empty_difficulty_table(), iteration=number, smoothing=0.0
    )
    store.write_difficulty(table, {"a"})
    store.write_pairs(PairTable.collect([PAIR, PAIR]))
    store.write_manifest(
        {"iteration": number, "complete": complete, "counts": {"pairs": 2}, "responses": {"sampled": 4}}
    )
    return store


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def shorten(path: Path) -> None:
    """Fewer pairs than there were, in a good file."""
    IterationStore(path.parent).write_pairs(PairTable.collect([PAIR]))


def poison_pairs(path: Path) -> None:
    """A token id that no policy of :data:`ROWS` embeddings has sampled, in a good file."""
    IterationStore(path.parent).write_pairs(
        PairTable.collect([PAIR, replace(PAIR, rejected_token_ids=(3, ROWS))])
    )


def poison_shard(path: Path) -> None:
    rows = read_rollouts(path)
    write_rollouts(path, [replace(rows[0], token_ids=(5, -1)), *rows[1:]])


HARMS: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "difficulty.parquet",
        cut,
        r"difficulty\.parquet is damaged \(.+\): restore it from a copy, or give the same",
    ),
    (
        "difficulty.parquet",
        Path.unlink,
        r"difficulty\.parquet is gone: restore it from a copy, or give the same",
    ),
    (
        "pairs.parquet",
        cut,
        r"pairs\.parquet is damaged \(.+\): restore it from a copy, or give the same command",
    ),
    ("pairs.parquet", Path.unlink, r"pairs\.parquet is gone: restore it from a copy, or give the same"),
    (
        "pairs.parquet",
        shorten,
        r"pairs\.parquet holds 1 pairs, but manifest\.json counts 2: restore it from a copy$",
    ),
    (
        "pairs.parquet",
        poison_pairs,
        r"pairs\.parquet holds the token id 9, but the policy has ids from 0 to 8 only: restore it from a copy, or",
    ),
    ("rollouts/probe-00001.parquet", cut, r"probe-00001\.parquet is damaged \(.+\): restore it from a copy"),
    (
        "rollouts/probe-00001.parquet",
        Path.unlink,
        r"rollouts holds 2 of the 4 responses that manifest\.json counts: restore its files from a copy$",
    ),
]


def test_what_quarantine_damaged_is_left_alone(folder: RunFolder) -> None:
    store = make(folder, 0)
    before = content(folder.root)
    assert quarantine_damaged(store, Rank(), embedding_rows=ROWS)
    check_trained(store, embedding_rows=ROWS)
    assert content(folder.root) == before


@pytest.mark.parametrize(("name", "harm", "wording"), HARMS)
def test_what_has_been_trained_on_cannot_be_made_again(
    folder: RunFolder, name: str, harm: Callable[[Path], None], wording: str
) -> None:
    store = make(folder, 0)
    harm(store.folder / name)
    before = content(folder.root)
    with pytest.raises(UserError, match=wording):
        check_trained(store, embedding_rows=ROWS)
    assert content(folder.root) == before


@pytest.mark.parametrize(("name", "harm"), [harm[:2] for harm in HARMS])
def test_what_has_not_been_trained_on_is_kept_aside(
    folder: RunFolder, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A shard is quarantined once it is made again."""
    store = make(folder, 0)
    path = store.folder / name
    harm(path)
    harmed = path.read_bytes() if path.exists() else None
    assert not quarantine_damaged(store, Rank(), embedding_rows=ROWS)
    (message,) = caplog.messages
    if harmed is None or "rollouts" in name:
        assert not path.with_name(f"{path.name}.damaged").exists()
        gone = path.parent if "rollouts" in name else path
        assert message == f"{gone} is gone, or lacks something: it is made anew"
    else:
        assert path.with_name(f"{path.name}.damaged").read_bytes() == harmed
        assert message == f"{path} is damaged: it is kept as {path.name}.damaged and made anew"


def test_a_shard_with_ids_that_the_policy_lacks_is_made_anew(folder: RunFolder) -> None:
    """Once its iteration is trained on, nothing reads the tokens any more."""
    store = make(folder, 0)
    poison_shard(store.shards.path("probe", 1))
    assert not quarantine_damaged(store, Rank(), embedding_rows=ROWS)
    check_trained(store, embedding_rows=ROWS)
    with pytest.raises(
        UserError, match=r"probe-00001\.parquet holds the token id -1, but the policy has ids from 0 to 8"
    ):
        store.shards.check("probe", 1, embedding_rows=ROWS)
    store.shards.check("probe", 0, embedding_rows=6)
    with pytest.raises(
        UserError, match=r"probe-00000\.parquet holds the token id 5, but the policy has ids from 0 to 4"
    ):
        store.shards.check_all(embedding_rows=5)


def test_the_first_process_decides(folder: RunFolder) -> None:
    """Another one, which comes later and finds everything mended, must still take part."""
    store = make(folder, 0)
    assert not quarantine_damaged(store, Rank(1, other=False), embedding_rows=ROWS)
    cut(store.folder / "pairs.parquet")
    before = content(folder.root)
    assert quarantine_damaged(store, Rank(1, other=True), embedding_rows=ROWS)
    assert content(folder.root) == before


def test_an_iteration_in_the_making(folder: RunFolder) -> None:
    assert not quarantine_damaged(folder.iteration(0), Rank(), embedding_rows=ROWS)
    store = make(folder, 0, complete=False)
    cut(store.shards.path("probe", 1))
    assert not quarantine_damaged(store, Rank(), embedding_rows=ROWS)
    with pytest.raises(
        UserError, match="000 is gone or incomplete although the checkpoint was trained on it: restore"
    ):
        check_trained(store, embedding_rows=ROWS)
    with pytest.raises(
        UserError, match="001 is gone or incomplete although the checkpoint was trained on it"
    ):
        check_trained(folder.iteration(1), embedding_rows=ROWS)


def test_rollouts_of_nobody_knows_whom(folder: RunFolder) -> None:
    store = make(folder, 0)
    (store.folder / "manifest.json").unlink()
    before = content(folder.root)
    message = r"000 holds rollouts but no manifest\.json, so nothing says which policy gave them: restore"
    with pytest.raises(UserError, match=message):
        quarantine_damaged(store, Rank(), embedding_rows=ROWS)
    assert content(folder.root) == before


# ------------------------------------------------------------------- iterations


def test_iterations_are_counted(folder: RunFolder) -> None:
    assert check_iterations(folder) == 0
    make(folder, 0)
    make(folder, 1)
    assert check_iterations(folder) == 2
    make(folder, 2, complete=False)
    (folder.root / "iterations/002.damaged").mkdir()
    assert check_iterations(folder) == 3
    folder.iteration(3).folder.mkdir()
    with pytest.raises(
        UserError, match="002 is gone or incomplete although iteration 3 was made after it: restore it"
    ):
        check_iterations(folder)


@pytest.mark.parametrize("number", [0, 1])
def test_an_iteration_that_is_gone_is_named(folder: RunFolder, number: int) -> None:
    for made in range(3):
        make(folder, made)
    shutil.rmtree(folder.iteration(number).folder)
    message = (
        rf"iterations/00{number} is gone or incomplete although iteration {number + 1} was made after it: restore "
        r"it, or start anew in another trainer\.default_root_dir$"
    )
    with pytest.raises(UserError, match=message):
        check_iterations(folder)


def test_an_iteration_under_another_name_is_named(folder: RunFolder) -> None:
    make(folder, 0)
    make(folder, 1)
    shutil.copytree(folder.iteration(0).folder, folder.iteration(2).folder)
    with pytest.raises(UserError, match=r"002 holds iteration 0, not 2: put the folders of iterations/ back"):
        check_iterations(folder)


def test_a_manifest_with_another_content_than_was_written(folder: RunFolder) -> None:
    """Good JSON, and a number that would silently decide something."""
    store = make(folder, 0)
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace('"pairs": 2', '"pairs": 3'))
    assert json.loads(path.read_text())["counts"] == {"pairs": 3}
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(its content and its digest differ\)"):
        check_iterations(folder)
