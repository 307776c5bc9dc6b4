"""Whatever a file holds: its parser returns, or raises the one error that a user reads in one line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sppo_lightning.cli.parse_errors import check_config_files, explain
from sppo_lightning.prompts.formats import FORMATS
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.store.integrity import check_iterations
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(max_size=12) | st.text(
    st.sampled_from("a \ud800\x00é"), max_size=4
)  # with half surrogate pairs
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system"]) | PLAIN,
            "content": VALUES,
            "name": VALUES,
        },
    ),
    max_size=3,
)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": st.just("x") | VALUES,
            "id": TEXTS | VALUES,
            **dict.fromkeys(("answer", "question", "text", "chosen", "instruction"), VALUES),
            **dict.fromkeys(("messages", "conversations"), TURNS | VALUES),
        },
    )
    | st.fixed_dictionaries({"prompt": st.just("x"), "id": TEXTS})
    | st.fixed_dictionaries({"messages": TURNS})
    | VALUES,
    max_size=3,
)


def read(path: Path) -> None:
    """Read prompts, and look at all of them as a run does."""
    with suppress(UserError):
        for prompt in read_prompts(str(path), key="data.prompts"):
            prompt.id.encode()
            json.dumps([dict(turn) for turn in prompt.messages], ensure_ascii=False, default=str).encode()


@pytest.mark.parametrize("ending", [*FORMATS, ".jsonl.gz", ".csv.zst", ".txt.xz", ".json.bz2"])
@FEW
@given(content=st.binary(max_size=60))
def test_prompt_files_of_any_bytes(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"p{ending}"
    path.write_bytes(content)
    read(path)


@FEW
@given(records=RECORDS)
def test_prompt_files_of_any_records(tmp_path: Path, records: list[Any]) -> None:
    (tmp_path / "p.json").write_text(json.dumps(records))
    read(tmp_path / "p.json")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read(tmp_path / "p.jsonl")


@FEW
@given(
    texts=st.lists(st.binary(max_size=6), min_size=1, max_size=4), column=st.sampled_from(["id", "prompt"])
)
def test_tables_of_any_bytes(tmp_path: Path, texts: list[bytes], column: str) -> None:
    stored = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": stored, column: stored}), tmp_path / "p.parquet")
    read(tmp_path / "p.parquet")


MANIFESTS = st.binary(max_size=60) | st.fixed_dictionaries(
    {},
    optional={
        name: VALUES | st.just(kind)
        for name, kind in {
            "iteration": 0,
            "complete": True,
            "counts": {"pairs": 1},
            "metrics": {"a": 1.0},
            "dropped": {},
            "digest": "x",
        }.items()
    },
).map(lambda content: json.dumps(content).encode())


@FEW
@given(content=MANIFESTS)
def test_manifests_of_anything(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    store: IterationStore = folder.iteration(0)
    store.folder.mkdir(parents=True, exist_ok=True)
    store.manifest_path.write_bytes(content)
    with suppress(UserError):
        check_iterations(folder)
    with suppress(UserError):
        manifest = store.read_manifest() or {}
        assert store.complete in (True, False)
        assert manifest["counts"]["pairs"] + sum(manifest["metrics"].values()) is not None


@pytest.mark.filterwarnings("ignore:.* rows that the checkpoint counts")
@FEW
@given(
    content=st.binary(max_size=80)
    | st.text(st.sampled_from('step,a\n"1 \x00é'), max_size=60).map(str.encode),
    rows=st.integers(0, 3),
)
def test_metrics_of_anything(tmp_path: Path, content: bytes, rows: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    logger = MetricsCSV(path)
    logger.resume_after(rows)
    with suppress(UserError):
        logger.log_metrics({"loss": 1.0}, 1)
        logger.log_metrics({"loss": 0.5}, 2)


CONFIGS = (
    st.binary(max_size=60)
    | st.text(st.sampled_from("ab:-[]{}&*!?|>%@\"'#, \n\t1."), max_size=40).map(str.encode)
    | VALUES.map(lambda content: json.dumps(content).encode())
    | st.lists(
        st.sampled_from(
            ["a: ", "? [b]\n", ": 1\n", "2001-99-99", "&a ", "*a", "[", "]", "!!int ", "'' ", "\n"]
        ),
        max_size=8,
    ).map(lambda parts: "".join(parts).encode())
    | st.dictionaries(TEXTS, PLAIN, max_size=3).map(
        lambda content: yaml.safe_dump(content).encode(errors="replace")
    )
)


@FEW
@given(content=CONFIGS)
def test_config_files_of_anything(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with suppress(UserError):
        check_config_files(["fit", "--config", str(path)])


@FEW
@given(message=TEXTS, owner=TEXTS)
def test_errors_of_the_parser_are_one_line(message: str, owner: str) -> None:
    outline = f"Problem with given class_path '{owner}':\n  - {message}\nGiven value: {message}"
    assert "\n" not in explain(outline, ["data.prompts"])
