"""``export --format preferences``: a run's pairs as a data set, read back as its users read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from support.models import byte_tokenizer
from transformers import AutoTokenizer

from sppo_lightning.__main__ import main
from sppo_lightning.export import HFModel, PreferenceData
from sppo_lightning.export.command import export
from sppo_lightning.prompts.chat_template import template_token_ids
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.types import Message, PreferencePair, UserError

RECORDED = Path(__file__).parents[1] / "support" / "old_run"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls|tojson }}{% endif %}{% if message.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of three iterations, in the current folder, with its prompt files."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "finished"


def store_of(run: Path, iteration: int) -> IterationStore:
    return IterationStore(run / f"iterations/{iteration:03d}")


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return records_of(folder / "train.jsonl")


def change_config(run: Path, **data: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"].update(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def ask(run: Path, records: Sequence[dict[str, Any]], *, template: str | None, **data: Any) -> None:
    """Let the run's last iteration have been asked ``records``, and answered each with two plain texts."""
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.save_pretrained(run / "policy")
    if template is None:
        (run / "policy/chat_template.jinja").unlink(missing_ok=True)
    Path("asked.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    change_config(run, prompts="asked.jsonl", **data)
    opening = [Message(role="system", content=data["system_prompt"])] if data else []
    pairs = []
    for prompt in read_prompts("asked.jsonl", key="data.prompts"):
        opened = prompt.messages[0]["role"] == "system"
        ids = template_token_ids(
            tokenizer,
            prompt.messages if opened else [*opening, *prompt.messages],
            add_generation_prompt=True,
            tools=prompt.metadata.get("tools"),
        )
        texts = {"chosen": f"Yes, {prompt.id}: «so» é", "rejected": "No"}
        tokens = {side: tokenizer(text)["input_ids"] for side, text in texts.items()}
        pairs.append(
            PreferencePair(
                prompt_id=prompt.id,
                prompt_token_ids=tuple(ids),
                chosen_token_ids=(*tokens["chosen"], tokenizer.eos_token_id),
                rejected_token_ids=tuple(tokens["rejected"]),
                **texts,
                chosen_reward=1 / 3,
                rejected_reward=-2.0,
            )
        )
    store_of(run, 2).write_pairs(PairTable.collect(pairs))


def test_the_last_iterations_pairs_with_the_prompts_of_the_file(run: Path) -> None:
    folder = export(str(run), PreferenceData())
    assert folder == run / "export-preferences"
    said = {record["id"]: record["prompt"] for record in records_of(Path("train.jsonl"))}
    pairs = store_of(run, 2).read_pairs()
    rows = rows_of(folder)
    assert len(rows) == len(pairs) > 0
    for row, pair in zip(rows, pairs, strict=True):
        assert row == {
            "prompt": [{"role": "user", "content": said[pair.prompt_id]}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "prompt_id": pair.prompt_id,
            "iteration": 2,
            "chosen_reward": pair.chosen_reward,
            "rejected_reward": pair.rejected_reward,
        }
    found = load_dataset(str(folder), split="train", cache_dir="cache")
    assert list(found) == rows
    assert not list(run.glob("*.unchecked"))


def test_one_iteration_and_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run), "--format=preferences", "--iteration=1", "--output=one"])
    main(["export", str(run), "--format", "preferences", "--iteration", "all", "--output", "all"])
    assert "The exported data lies in" in capsys.readouterr().out
    counts = [len(store_of(run, number).read_pairs()) for number in range(3)]
    assert [row["iteration"] for row in rows_of(Path("one"))] == [1] * counts[1]
    numbers = [row["iteration"] for row in rows_of(Path("all"))]
    assert numbers == [number for number, count in enumerate(counts) for _ in range(count)]


def test_the_card_says_what_made_it_and_no_paths(run: Path, tmp_path: Path) -> None:
    change_config(run, prompts=str(tmp_path / "train.jsonl"))
    card = (export(str(run), PreferenceData(), iteration="all") / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "| selection | Easiest(fraction=0.8) |" in card
    assert "| prompts | train.jsonl |" in card
    manifest = store_of(run, 1).read_manifest()
    assert manifest is not None
    counts, dropped = manifest["counts"], manifest["dropped"]
    left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    row = (counts["prompts"], counts["selected"], counts.get("paired_prompts", ""), counts["pairs"], left_out)
    line = " | ".join(map(str, (1, *row, manifest["policy_fingerprint"])))
    assert f"| {line} |" in card.replace("\\", "")
    assert "responses do not end in an end token" in card


def test_a_prompt_file_that_is_gone_is_made_up_for_by_the_stored_texts(run: Path) -> None:
    expected = rows_of(export(str(run), PreferenceData(), output="before"))
    Path("train.jsonl").unlink()
    assert rows_of(export(str(run), PreferenceData(), output="after")) == expected


def test_a_pruned_iteration_needs_the_prompt_file(run: Path) -> None:
    store = store_of(run, 2)
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    rows = rows_of(export(str(run), PreferenceData(), output="with"))
    Path("train.jsonl").rename("moved.jsonl")
    expected = (
        r"^what (\d+) of \1 prompts said is not known, e\.g\. 'train\d+': data\.prompts=.*no such file; .*; name the "
        r"file that the run was started with: --format\.prompts FILE$"
    )
    with pytest.raises(UserError, match=expected):
        export(str(run), PreferenceData(), output="without")
    assert not Path("without").exists()
    assert not Path("without.unchecked").exists()
    main(["export", str(run), "--format=preferences", "--format.prompts=moved.jsonl", "--output=named"])
    assert rows_of(Path("named")) == rows


def test_a_prompt_file_that_says_something_else_now_is_noticed(run: Path) -> None:
    store = store_of(run, 2)
    store.mark_pruned()
    shutil.rmtree(store.shards.folder)
    first = store.read_pairs()[0].prompt_id
    records = records_of(Path("train.jsonl"))
    for record in records:
        if record["id"] == first:
            record["prompt"] += "!"
    Path("train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with pytest.raises(UserError, match=rf"^what 1 of \d+ .* e\.g\. '{first}': data\.prompts=.* has changed"):
        export(str(run), PreferenceData())


def test_conversations_tools_and_a_system_prompt(run: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "30"},
        {"role": "user", "content": "And?"},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    records = [{"id": "a", "messages": turns, "tools": TOOLS}, {"id": "b", "messages": plain}]
    ask(run, records, template=WITH_TOOLS, system_prompt="Be kind.")
    folder = export(str(run), PreferenceData())
    first, second = rows_of(folder)
    assert first["prompt"] == [{"role": "system", "content": "Be kind."}, *turns]
    assert json.loads(first["tools"]) == TOOLS
    assert second["prompt"] == plain
    assert second["tools"] is None
    assert list(load_dataset(str(folder), split="train", cache_dir="cache")) == [first, second]
    assert "gives the sampled token ids for 4 of 4 responses" in (folder / "README.md").read_text()


def test_plain_text_stays_plain_text(run: Path) -> None:
    ask(run, [{"id": "a", "prompt": "Once upon a "}], template=None)
    (row,) = rows_of(export(str(run), PreferenceData()))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Once upon a ", "Yes, a: «so» é", "No")
    assert (row["chosen_reward"], row["rejected_reward"]) == (1 / 3, -2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iteration": 7}, r"has no complete pairs of iteration 7, only of 0, 1, 2: name one of those"),
        ({"iteration": "best"}, r"^--iteration best is for policies: give a number, or all"),
        ({"dtype": "float16"}, r"^--dtype is for policies: leave it out"),
        ({"device": "cuda"}, r"^--device is for policies: leave it out"),
    ],
)
def test_options_that_do_not_fit(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(str(run), PreferenceData(), **options)


def test_pairs_that_are_not_there(run: Path, tmp_path: Path) -> None:
    store_of(run, 1).pairs_path.unlink()
    with pytest.raises(UserError, match=r"pairs\.parquet is gone, so that iteration 1 has no pairs any more"):
        export(str(run), PreferenceData(), iteration=1)
    shutil.rmtree(run / "iterations")
    with pytest.raises(UserError, match=r"has no iteration whose pairs are complete yet: run fit for longer"):
        export(str(run), PreferenceData())
    with pytest.raises(UserError, match=r"--iteration all is for data"):
        export(str(run), HFModel(), iteration="all")
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml"):
        export(str(tmp_path / "policy"), PreferenceData())


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [True, False])
def test_trl_makes_the_stored_tokens_of_it(run: Path, conversational: bool) -> None:
    """In plain text its trainer puts the end token into the text, which the tokenizer reads as one."""
    trl = pytest.importorskip("trl")
    turns = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "Is it not?"},
    ]
    records: list[dict[str, Any]] = [{"id": "a", "prompt": "Is it so?"}]
    if conversational:
        records.append({"id": "b", "messages": turns})
    ask(run, records, template=byte_tokenizer().chat_template if conversational else None)
    train = load_dataset(str(export(str(run), PreferenceData())), split="train", cache_dir="cache")
    trainer = trl.DPOTrainer(
        model=str(run / "policy"),
        args=trl.DPOConfig(output_dir="trl", report_to="none", use_cpu=True, max_length=None),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(run / "policy"),
    )
    end = byte_tokenizer().eos_token_id
    for row, pair in zip(trainer.train_dataset, store_of(run, 2).read_pairs(), strict=True):
        assert tuple(row["prompt_ids"]) == pair.prompt_token_ids
        assert tuple(row["chosen_ids"]) == pair.chosen_token_ids
        assert tuple(row["rejected_ids"]) == (*pair.rejected_token_ids, end)
    loss = trainer.train().training_loss
    assert 0 < loss < 10
