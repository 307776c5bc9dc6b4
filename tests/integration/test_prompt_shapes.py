"""Every shape and format of prompts, through the real command, as far as the tokens that the policy continued."""

from __future__ import annotations

import gzip
import hashlib
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from prompts.test_shapes import RECORDS, turns
from support.models import byte_tokenizer
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.prompts.chat_template import template_token_ids
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Message, Rollout

TEXTS = ["Name a lake", "Name a sea"]
SETTINGS: dict[str, Any] = {"trainer__enable_progress_bar": "false", "data__generator__max_new_tokens": 4}


def packed(path: Path, pack: Callable[[bytes], bytes]) -> None:
    path.write_bytes(
        pack("\n".join(json.dumps({"prompt": f"{text} {path.name}"}) for text in TEXTS).encode())
    )


def lined(path: Path, *header: str, more: str = "") -> None:
    path.write_text(
        "".join(f"{line}{more}\n" for line in (*header, *(f"{text} {path.name}" for text in TEXTS)))
    )


def saved(folder: Path, name: str = "") -> None:
    records = [{"prompt": f"{text} {name or folder.name}"} for text in TEXTS]
    datasets.Dataset.from_list(records).save_to_disk(str(folder))


def arrow(path: Path) -> None:
    saved(path.with_suffix(""), path.name)
    next(path.with_suffix("").glob("*.arrow")).rename(path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "f.jsonl.gz": lambda path: packed(path, gzip.compress),
    "f.jsonl.zst": lambda path: packed(
        path, lambda content: pa.Codec("zstd").compress(content, asbytes=True)
    ),
    "f.tsv": lambda path: lined(path, "prompt", more="\tx"),
    "f.txt": lined,
    "f.arrow": arrow,
    "saved": saved,
}


def numbered(value: Any, number: int) -> Any:
    """The same record, or its turns, with a question of its own: equal ones would count once."""
    text = json.dumps(value).replace("a river", f"river {number}").replace("one of these", f"one of {number}")
    return json.loads(text)


def digest(messages: list[Message]) -> str:
    """Of a prompt's token ids, as shards keep it."""
    ids = template_token_ids(byte_tokenizer(), messages, add_generation_prompt=True)
    return hashlib.blake2b(array("q", ids), digest_size=8).hexdigest()


def test_a_step_on_every_shape_and_format(tiny_policy: Path, tmp_path: Path) -> None:
    """In one run: a source each, and all of their prompts are sampled from."""
    sources, expected = [], set()
    for number, (_, record, said, _) in enumerate(RECORDS.values()):
        path = tmp_path / f"shape-{number}.jsonl"
        path.write_text(json.dumps(numbered(record, number)) + "\n")
        sources.append(str(path))
        expected.add(digest(numbered(said, number)))
    for name, write in FORMATS.items():
        write(tmp_path / name)
        sources.append(str(tmp_path / name))
        expected |= {digest([*turns(f"{text} {name}")]) for text in TEXTS}
    assert len(expected) == len(RECORDS) + 2 * len(FORMATS)
    settings = {**SETTINGS, "data__iterations": 1, "data__prompts_per_shard": 50}
    main(
        [
            "fit",
            *cli_arguments(tiny_policy, Path(), tmp_path / "run", **settings),
            f"--data.prompts={sources}",
        ]
    )
    folder = RunFolder(tmp_path / "run")
    shards = folder.iteration(0).shards
    assert set(shards.prompt_digests("probe", 0).values()) == expected
    rollouts = list(shards.read_all("probe"))
    assert len(rollouts) == 2 * len(expected)
    assert all(row.token_ids and row.reward is not None for row in rollouts)
    asked = {row.prompt for row in rollouts}
    assert {f"{text} {name}" for name in FORMATS for text in TEXTS} <= asked
    assert len(folder.iteration(0).read_pairs()) >= 4
    assert folder.last_checkpoint.exists()


@pytest.mark.parametrize("name", ["plain", "HH-RLHF", "ShareGPT, system apart"])
def test_a_fast_dev_run(
    name: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sppo_lightning.store import shards

    written: list[Rollout] = []
    write = shards.write_rollouts

    def remember(path: Path, rows: list[Rollout], *rest: Any) -> None:
        written.extend(rows)
        write(path, rows, *rest)

    monkeypatch.setattr(shards, "write_rollouts", remember)
    source = tmp_path / "p.jsonl"
    records = [numbered(RECORDS[name][1], number) for number in range(12)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {**SETTINGS, "trainer__fast_dev_run": "true"}
    main(["fit", *cli_arguments(tiny_policy, source, tmp_path / "run", **settings)])
    assert len({row.prompt_id for row in written}) >= 4
    assert all("Name river" in row.prompt and row.token_ids for row in written)
    assert not (tmp_path / "run").exists()
