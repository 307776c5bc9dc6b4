"""Where records come from: formats, compression, folders, saved data sets, and what is said about them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_lightning.paths import expand_path
from sppo_lightning.prompts import formats, reading
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
    monkeypatch.setattr(reading.LOGGER, "info", said.append)
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


# ------------------------------------------------------------ accidents and attacks


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for, a device read for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for source in ("pipe.jsonl", "zero.jsonl", "p*.jsonl"):
        with pytest.raises(
            UserError, match=r"(pipe|zero)\.jsonl is no plain file, .*: copy its content into a"
        ):
            texts(tmp_path / source)
    with pytest.raises(UserError, match=r"folder .* has no \.jsonl"):
        texts(tmp_path)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    with pytest.raises(
        UserError, match=r"self\.jsonl cannot be read \(Too many levels of symbolic links\)|no such"
    ):
        texts(tmp_path / "self.jsonl")
    (tmp_path / "all" / "sub").mkdir(parents=True)
    (tmp_path / "all" / "sub" / "again").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "sub" / "p.jsonl").write_text(LINES)
    assert texts(tmp_path / "all") == ["a", "b"]
    assert texts(f"{tmp_path}/all/**/*.jsonl") == ["a", "b"]


@pytest.mark.parametrize("name", ["a" * 5000 + ".jsonl", "a" * 5000, "a\0b.jsonl"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        texts(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ".tsv"])
def test_a_small_file_that_unfolds_to_a_large_one(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 2**20)
    monkeypatch.setattr(formats, "LONGEST_LIST", 2**20)
    start = {".json": b"[", ".csv": b'prompt\n"', ".tsv": b"prompt\n"}.get(ending, b"")
    for name, packed in ((f"p{ending}.gz", gzip.compress), (f"p{ending}.zst", zstd)):
        (tmp_path / name).write_bytes(packed(start + b" " * 2**24))
        with pytest.raises(
            UserError, match=r"is longer than 1 MiB: is this a file of prompts|larger than 1 MiB: "
        ):
            texts(tmp_path / name)


def test_a_quote_that_is_never_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 2**16)
    (tmp_path / "p.csv").write_text('prompt\n"' + "a line\n" * 2**16)
    with pytest.raises(UserError, match=r"p\.csv:\d+: broken CSV, field larger than field limit"):
        texts(tmp_path / "p.csv")


def test_a_table_of_many_columns(tmp_path: Path) -> None:
    """Neither their comparison nor the message grows with their square, or without an end."""
    names = ",".join(f"c{number}" for number in range(10**5))
    (tmp_path / "p.csv").write_text(f"{names}\n{names}\n")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"its fields are: c0, c1, .*, and 99988 more\. Records") as caught:
        texts(tmp_path / "p.csv")
    assert time.monotonic() - start < 20
    assert len(str(caught.value)) < 2000


def test_a_field_or_a_column_that_stands_twice(tmp_path: Path) -> None:
    """One of the two values would be lost in silence."""
    (tmp_path / "p.jsonl").write_text(LINES + '{"prompt": "c", "prompt": "d"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:3: the field 'prompt' stands twice: rename or remove one"):
        texts(tmp_path / "p.jsonl")
    (tmp_path / "p.json").write_text('[{"prompt": "c", "metadata": {"a": 1, "a": 2}}]')
    with pytest.raises(UserError, match=r"p\.json: the field 'a' stands twice"):
        texts(tmp_path / "p.json")
    pq.write_table(
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "p.parquet"
    )
    with pytest.raises(UserError, match=r"p\.parquet: two columns are called 'prompt': rename one"):
        texts(tmp_path / "p.parquet")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", LINES), ("p.txt", "a\nb\n"), ("p.csv", "prompt\na\n")]
)
def test_text_of_another_encoding(name: str, content: str, encoding: str, tmp_path: Path) -> None:
    """Without its mark, UTF-16 of plain letters is UTF-8 with a NUL after each letter."""
    (tmp_path / name).write_text(content, encoding=encoding)
    with pytest.raises(
        UserError, match=rf"{name}:1: (not UTF-8|a NUL byte, .*) \(byte \d\): save the file as UTF-8"
    ):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p.csv"])
def test_lines_that_end_by_carriage_returns(name: str, tmp_path: Path) -> None:
    lines = {"p.jsonl": ['{"prompt": "a"}'] * 2, "p.txt": ["a", "b"], "p.csv": ["prompt", "a"]}[name]
    (tmp_path / name).write_bytes("\r".join([*lines, ""]).encode())
    with pytest.raises(UserError, match=r":1: (broken JSON|broken CSV|a carriage return inside a line)"):
        texts(tmp_path / name)


def test_the_empty_cells_of_pandas_are_empty(tmp_path: Path) -> None:
    """An answer of NaN would be the text nan, to which a metric compares."""
    nan = float("nan")
    columns = {"prompt": ["a", "b"], "answer": [nan, 4.0], "id": [nan, 7.0]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    first, second = read_prompts(str(tmp_path / "p.parquet"), key="data.prompts")
    assert (first.answer, second.answer) == (None, "4.0")
    assert first.id != "nan"
    assert second.id == "7.0"


def test_files_of_several_schemas_in_one_folder(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": ["b"], "answer": [4]}), tmp_path / "b.parquet")
    assert texts(tmp_path) == ["a", "b"]
    pq.write_table(pa.table({"prompt": ["c"], "id": ["1"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet:row 1: id '1' was already used at .*a\.parquet:row 1"):
        texts(tmp_path)
