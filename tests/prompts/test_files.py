"""Where records come from: formats, compression, folders, saved data sets, and what is said about them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from sppo_lightning.paths import expand_path
from sppo_lightning.prompts import reading
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.types import UserError

LINES = "".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b"))


def texts(source: Path | str) -> list[str]:
    return [prompt.text for prompt in read_prompts(str(source), key="data.prompts")]


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl.gz", gzip.compress(LINES.encode())),
        ("p.jsonl.zst", zstd(LINES.encode())),
        ("p.jsonl.bz2", bz2.compress(LINES.encode())),
        ("p.jsonl.xz", lzma.compress(LINES.encode())),
        ("p.json.gz", gzip.compress(b'[{"prompt": "a"}, {"prompt": "b"}]')),
        ("p.csv.zst", zstd(b"prompt,note\na,1\nb,2\n")),
        ("P.JSONL", LINES.encode()),
        ("p.ndjson", LINES.encode()),
        ("p.json", LINES.encode()),  # as many call it
        ("p.tsv", b'prompt\tnote\na\t1\n"b"\t2\n'),
        ("p.txt", b"\xef\xbb\xbfa\r\n\r\nb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_any_format_is_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == ["a", "b"]


def test_a_line_of_a_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.zst").write_bytes(zstd(LINES.encode() + b"{"))
    with pytest.raises(UserError, match=r"p\.jsonl\.zst:3: broken JSON"):
        texts(tmp_path / "p.jsonl.zst")


def test_a_truncated_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 1000)[:-20])
    with pytest.raises(UserError, match=r"p\.jsonl\.gz cannot be read"):
        texts(tmp_path / "p.jsonl.gz")


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    table.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["a", "b"]
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert texts(arrow) == ["a", "b"]
    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    splits.save_to_disk(str(tmp_path / "two"))
    assert texts(f"{tmp_path}/two:test") == ["b"]
    with pytest.raises(UserError, match=r"two has the splits train, test: name one, e\.g\. .*two:train$"):
        texts(tmp_path / "two")
    with pytest.raises(UserError, match=r"two has no split 'dev'; it has train, test"):
        texts(f"{tmp_path}/two:dev")
    with pytest.raises(UserError, match=r"one is one data set without splits: leave out ':train'"):
        texts(f"{tmp_path}/one:train")


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name}))


def test_splits_of_one_data_set_are_not_joined(tmp_path: Path) -> None:
    names = (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    )
    write(tmp_path, *names)
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(
        UserError, match=r"holds files of several splits \(test, train\): name one, e\.g\. .*:train$"
    ):
        texts(tmp_path)
    assert texts(f"{tmp_path}:train") == list(names[:2])
    assert texts(f"{tmp_path}:test") == list(names[2:])
    with pytest.raises(UserError, match=r"no files of the split 'dev'; found: test, train"):
        texts(f"{tmp_path}:dev")


def test_what_a_folder_gave_and_what_it_did_not_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading, "rank_zero_info", said.append)
    write(tmp_path, "a.jsonl", "dataset_info.json", "notes.txt", ".hidden.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "b.jsonl.gz"}'))
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl.gz"]
    assert said == [
        f"data.prompts: read from {tmp_path}: a.jsonl, b.jsonl.gz; left out: dataset_info.json, notes.txt"
    ]


def test_home_and_environment_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "p.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PROMPTS", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    for source in ("~/p.jsonl", "$PROMPTS/p.jsonl", "${PROMPTS}/*.jsonl", "$PROMPTS"):
        assert texts(source) == ["p.jsonl"]
    assert expand_path("a b/c", key="k") == "a b/c"
    with pytest.raises(UserError, match=r"^k='\$NOWHERE/p': the environment variable \$NOWHERE is not set$"):
        expand_path("$NOWHERE/p", key="k")
    with pytest.raises(UserError, match=r"^k='~no-such-user/p': there is no such user$"):
        expand_path("~no-such-user/p", key="k")
    for url in ("s3://bucket/x", "hf://datasets/x", "file:///x"):
        with pytest.raises(UserError, match=r"is a URL: only folders and files of this machine"):
            expand_path(url, key="k")


def test_a_hub_dataset_with_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("own/set", "own/set:test", "own/set:main:test", "own/set:main:"):
        assert texts(source) == ["a"]
    assert asked == [
        ("own/set", None, "train"),
        ("own/set", None, "test"),
        ("own/set", "main", "test"),
        ("own/set", "main", "train"),
    ]
    with pytest.raises(UserError, match="write owner/name, owner/name:split or owner/name:config:split"):
        texts("own/set:a:b:c")
