"""Prompts from files, and their token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_lightning.prompts import reading as prompts_module
from sppo_lightning.prompts.reading import check_disjoint, read_every_record, read_prompts
from sppo_lightning.types import Message, Prompt, UserError

BOS, EOS = 0, 1
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Name a river", "answer": "Rhine", "topic": "geography"},
    {"id": "b", "prompt": "Name a cloud", "answer": "Cirrus", "topic": "weather"},
]


def user(text: str) -> Message:
    return Message(role="user", content=text)


def prompt(text: str, *, id: str = "p") -> Prompt:
    return Prompt(id=id, text=text, messages=(user(text),))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write ``records`` in the format of the file's name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".csv":
        rows = [records[0].keys(), *(record.values() for record in records)]
        path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


# ------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_prompts(suffix: str, tmp_path: Path) -> None:
    found = read_prompts(str(write(tmp_path / f"prompts.{suffix}", RECORDS)), key="data.prompts")
    assert list(found) == [
        Prompt("a", "Name a river", (user("Name a river"),), "Rhine", {"topic": "geography"}),
        Prompt("b", "Name a cloud", (user("Name a cloud"),), "Cirrus", {"topic": "weather"}),
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_messages_are_kept_as_turns(suffix: str, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river"}]
    path = write(tmp_path / f"chat.{suffix}", [{"messages": turns, "level": 3}])
    (found,) = read_prompts(str(path), key="data.prompts")
    assert found.messages == (Message(role="system", content="Be brief."), user("Name a river"))
    assert found.text == "Name a river"
    assert found.metadata == {"level": 3}


def test_a_folder_a_glob_and_a_list_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "2.jsonl", RECORDS[1:])
    write(tmp_path / "1.csv", RECORDS[:1])
    (tmp_path / "README.md").write_text("not a prompt file")
    ids = [
        [item.id for item in read_prompts(source, key="data.prompts")]
        for source in (
            str(tmp_path),
            str(tmp_path / "[12].*"),
            [str(tmp_path / "2.jsonl"), str(tmp_path / "1.csv")],
        )
    ]
    assert ids == [["a", "b"], ["a", "b"], ["b", "a"]]


def test_csv_cells_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Nothing is guessed: no number loses its zeros, no ``None`` becomes a missing answer."""
    path = tmp_path / "prompts.csv"
    path.write_bytes('\ufeffid,prompt,answer,note\r\n007,"12, or\n13?",None,\r\n'.encode())
    (found,) = read_prompts(str(path), key="data.prompts")
    assert (found.id, found.text, found.answer, found.metadata) == ("007", "12, or\n13?", "None", {})


def test_long_csv_cells_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(read_prompts(str(path), key="data.prompts")[0].text) == 200_000


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [item.text for item in read_prompts(str(path), key="data.prompts")] == ["a", "b"]


def test_empty_source_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match=r"data\.prompts is an empty text: name a file"):
        read_prompts("", key="data.prompts")


def test_unreachable_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        read_prompts("no-such-owner/no-such-set:test", key="data.prompts")
    line = str(error.value)
    assert line.startswith(
        "data.prompts='no-such-owner/no-such-set:test' is neither a file here nor a dataset"
    )
    assert "check the path, or the id and the network" in line
    assert "\n" not in line


# ----------------------------------------------------------------------- ids


def test_ids_are_a_stable_hash_of_the_messages_alone(tmp_path: Path) -> None:
    """Golden: ``printf '[["user", "Name a river"]]' | b2sum -l 64``; a change would orphan every stored run."""
    plain, chat = {"prompt": "Name a river"}, {"messages": [{"role": "user", "content": "Name a river"}]}
    for record in (plain, chat, {**plain, "answer": "Rhine", "topic": "x"}, {**plain, "id": None}):
        (found,) = read_prompts(str(write(tmp_path / "p.jsonl", [record])), key="data.prompts")
        assert found.id == "2e47a6c3c02d3f5d"


def test_repeated_records_count_once_and_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(prompts_module.LOGGER, "info", told.append)
    path = write(tmp_path / "p.jsonl", [*RECORDS, RECORDS[0], RECORDS[0]])
    assert [item.id for item in read_prompts(str(path), key="data.prompts")] == ["a", "b"]
    assert told == ["data.prompts: 2 records repeat another prompt and count once"]


def test_one_id_for_two_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}])
    with pytest.raises(
        UserError, match=r"p\.jsonl:2: id '1' was already used at .*p\.jsonl:1 by a prompt with"
    ):
        read_prompts(str(path), key="data.prompts")


def test_the_first_of_two_prompts_stands_in_another_file(tmp_path: Path) -> None:
    """After a prompt that is repeated, and in a record without an id of its own."""
    first = write(tmp_path / "1.jsonl", [*RECORDS, {"prompt": "x", "answer": "1"}])
    second = write(tmp_path / "2.json", [RECORDS[1], {"prompt": "x", "answer": "2"}])
    with pytest.raises(UserError) as error:
        read_prompts([str(first), str(second)], key="data.prompts")
    assert str(error.value).startswith(
        f"{second}:record 2: the same prompt stands at {first}:3 with another answer"
    )


def test_one_prompt_with_two_answers_and_no_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "x", "answer": "2"}])
    with pytest.raises(
        UserError, match=r"p\.jsonl:2: the same prompt stands at .*p\.jsonl:1 with another answer"
    ):
        read_prompts(str(path), key="data.prompts")


def test_overlap_is_found_whatever_the_ids_and_the_white_space() -> None:
    train = [prompt("Name a river", id="t0"), prompt("Name a cloud", id="t1")]
    check_disjoint(train, [prompt("Name a stone", id="t0")], key="data.eval_prompts")
    with pytest.raises(UserError) as error:
        check_disjoint(
            train, [prompt("Name a stone"), prompt("Name a cloud\n", id="e")], key="data.eval_prompts"
        )
    assert str(error.value) == (
        "1 of 2 prompts of data.eval_prompts are also in data.prompts (first: 'e' = training prompt 't1'): "
        "remove them on one side"
    )


def test_overlap_is_found_in_a_stream_and_names_the_last_training_prompt() -> None:
    held_out = [prompt("Name a cloud", id="e0"), prompt("Name a stone", id="e1")]
    train = (prompt("Name a stone", id=f"t{number}") for number in range(3))
    with pytest.raises(UserError, match=r"^1 of 2 prompts .* \(first: 'e1' = training prompt 't2'\): remove"):
        check_disjoint(train, held_out, key="data.eval_prompts")
    check_disjoint(iter(()), held_out, key="data.eval_prompts")


def test_the_same_words_in_another_role_are_another_prompt() -> None:
    turns = [(Message(role=role, content="Be brief."), user("Hi")) for role in ("system", "user")]
    train, held_out = (Prompt("p", "Hi", messages) for messages in turns)
    check_disjoint([train], [held_out], key="data.eval_prompts")


# ------------------------------------------------------------ broken records


@pytest.mark.parametrize(
    ("name", "content", "wording"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: broken JSON, Expecting value at column"),
        (
            "p.json",
            b'[{"prompt": "a"},\n{"prompt" "b"}]',
            r"p\.json:2: broken JSON, Expecting ':' delimiter at",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', r"p\.jsonl:2: not UTF-8 \(byte 15\): save"),
        ("p.json", b'[{"prompt": "a"},\n{"prompt": "caf\xe9"}]', r"p\.json:2: not UTF-8"),
        ("p.csv", b"prompt\na\ncaf\xe9\n", r"p\.csv:3: not UTF-8"),
        ("p.csv", b"prompt,answer\na,b,c\n", r"p\.csv:2: 3 cells under 2 columns: put quotes around"),
        ("p.csv", b'prompt\n"a"b\n', r"p\.csv:2: broken CSV, ',' expected after '\"': check the quotes"),
        (
            "p.csv",
            b"query\na\n",
            r"p\.csv:2: no prompt is recognised; its fields are: query\. .*ShareGPT.*data\.columns",
        ),
        ("p.json", b'"prompt"', r"p\.json: expected a JSON list of prompt records"),
        ("p.json", b'{"data":\n [1]}', r"p\.json:1: broken JSON, .*: each line must be one JSON object"),
        ("p.jsonl", b'["a"]', r"p\.jsonl:1: expected a JSON object with a 'prompt' field, got list"),
        ("p.jsonl", b'{"prompt": " "}', r"'prompt' must be a text that is not empty, got ' '"),
        ("p.jsonl", b'{"prompt": ["a"]}', r"'prompt' must be a non-empty list of .*, got 'a'"),
        (
            "p.jsonl",
            b'{"prompt": "a", "id": true}',
            r"'id' must be a text that is not empty, or a number, got",
        ),
        ("p.jsonl", b'{"prompt": "a", "answer": ["b"]}', r"'answer' must be a text .*, got \['b'\]"),
        ("p.jsonl", b'{"prompt": "a\\ud83d"}', r"p\.jsonl:1: half of a surrogate pair at character 2"),
        ("p.jsonl", b'{"messages": []}', r"'messages' must be a non-empty list of .*, got \[\]"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', r"'messages' must be .*, got \{'role': 'user'\}"),
        (
            "p.jsonl",
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            r"the last message is the assistant's, with nothing .*: end with the user's",
        ),
        ("p.jsonl", b'{"messages": [{"role": "user", "content": ""}]}', r"the last message is empty"),
        ("p.jsonl", b"\n", r"data\.prompts='.*p\.jsonl' holds no prompts: add at least one record"),
        ("p.json", b"", r"data\.prompts='.*p\.json' holds no prompts"),
        ("p.csv", b"prompt,answer\n", r"data\.prompts='.*p\.csv' holds no prompts"),
        ("p.parquet", b"no parquet", r"p\.parquet: cannot be read as Parquet: "),
        ("p.md", b"a", r"data\.prompts: .*p\.md is none of \.jsonl, \.ndjson, \.json, \.csv, .*\.gz"),
        ("p.jsonl.gz", b"a", r"data\.prompts: .*p\.jsonl\.gz cannot be read \(Not a gzipped file"),
        ("p.jsonl.zst", b"a", r"data\.prompts: .*p\.jsonl\.zst cannot be read"),
        ("p.arrow", b"no arrow", r"p\.arrow: cannot be read as Arrow: "),
        ("p.csv", b"prompt,prompt\na,b\n", r"p\.csv:1: two columns are called 'prompt': rename one"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1: JSON that is nested too deep"),
        (
            "p.jsonl",
            b'{"prompt": ' + b"9" * 5000 + b"}",
            r"p\.jsonl:1: Exceeds the limit .*write it as a text",
        ),
    ],
)
def test_broken_files_name_the_place(name: str, content: bytes, wording: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=wording):
        read_prompts(str(tmp_path / name), key="data.prompts")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"query": "a"}])
    with pytest.raises(UserError, match=r"p\.parquet:row 1: no prompt is recognised; its fields are: query"):
        read_prompts(str(path), key="data.prompts")


def test_a_folder_without_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"data\.prompts: folder .* has no \.jsonl, \.ndjson, \.json, .*\.arrow file"
    ):
        read_prompts(str(tmp_path), key="data.prompts")


def test_every_record_where_repeated_ones_count(tmp_path: Path) -> None:
    """Without ids: the same text is the same prompt, but each record keeps what else it says."""
    records = [
        {"prompt": "Name a river", "row": 0},
        {"prompt": "Name a cloud"},
        {"prompt": "Name a river", "row": 2},
    ]
    file = write(tmp_path / "prompts.jsonl", records)
    found = read_every_record(str(file), key="data.prompts")
    assert [one.text for one in found] == [record["prompt"] for record in records]
    assert found[0].id == found[2].id != found[1].id
    assert [one.metadata.get("row") for one in found] == [0, None, 2]
    assert read_prompts(str(file), key="data.prompts").ids == [found[0].id, found[1].id]
