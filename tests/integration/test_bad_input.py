"""Bad input ends in one clear line and exit status 2, and before any weights are read where that is possible."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments, letter_reward

from sppo_lightning.__main__ import main

Arguments = Callable[..., list[str]]
Refused = Callable[[list[str]], str]
RECORDS = [{"id": f"p{n}", "prompt": f"Say it {n} times", "answer": str(n)} for n in range(12)]
METRIC: dict[str, Any] = {
    "data__reward": "sppo_lightning.rewards.TorchmetricsReward",
    "data__reward__function": None,
    "data__reward__metric": "torchmetrics.text.SQuAD",
    "data__reward__output": "f1",
}
LORA = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8}


class WeightsReadError(AssertionError):
    """A test came as far as the policy's weights."""


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with everything but weights."""
    folder = tmp_path_factory.mktemp("weightless")
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(weightless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """Arguments of a good run, with changes; reading its policy's weights is a test's failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise WeightsReadError

    monkeypatch.setattr("sppo_lightning.policy.loading.load_policy", refuse)
    prompts = write(tmp_path / "good.jsonl", RECORDS)
    return lambda **changes: ["fit", *cli_arguments(weightless, prompts, tmp_path / "run", **changes)]


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; return its one line, without the program's name."""

    def run(args: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err + printed.out
        lines = [line for line in printed.err.splitlines() if "error:" in line]
        assert len(lines) == 1
        assert printed.err.splitlines()[-1] == lines[0]  # nothing after it
        assert lines[0].startswith("sppo-lightning: error: ")
        assert not list(tmp_path.glob("run/iterations/*/rollouts/*"))  # nothing was sampled
        return lines[0].removeprefix("sppo-lightning: error: ")

    return run


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_good_arguments_come_as_far_as_the_weights(arguments: Arguments, weightless: Path) -> None:
    """So whatever the other tests refuse was refused because of what they change, and before that point."""
    assert not list(weightless.glob("*.safetensors"))
    with pytest.raises(WeightsReadError):
        main(arguments())


# ------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("name", "content", "wording"),
    [
        ("empty.jsonl", b"", r"data\.prompts='.*empty\.jsonl' holds no prompts: add at least one record"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: broken JSON, .*: each line must be one"),
        (
            "p.json",
            b'[{"prompt": "a"},\n{"prompt"}]',
            r"p\.json:2: broken JSON, .*: the file must be one JSON",
        ),
        ("p.jsonl", b'{"prompt": "caf\xe9"}', r"p\.jsonl:1: not UTF-8 \(byte 15\): save the file as UTF-8"),
        ("p.json", b'[{"prompt": "caf\xe9"}]', r"p\.json:1: not UTF-8 \(byte 16\): save the file as UTF-8"),
        ("p.csv", b"prompt\ncaf\xe9\n", r"p\.csv:2: not UTF-8 \(byte 3\): save the file as UTF-8"),
        ("p.csv", b"query\na\n", r"p\.csv:2: no prompt is recognised; its fields are: query"),
        ("p.jsonl", b'{"query": "a"}', r"p\.jsonl:1: no prompt is recognised; its fields are: query"),
        (
            "p.jsonl",
            b'{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n',
            r"p\.jsonl:2: id 'a' was already used at .*p\.jsonl:1 .*: give each prompt its own id",
        ),
        (
            "p.jsonl",
            b'{"id": "a\\ud800", "prompt": "x"}',
            r"p\.jsonl:1: 'id': half of a surrogate pair at character 2, .*: remove it",
        ),
        (
            "p.jsonl",
            b'{"messages": [{"role": "\\ud800", "content": "x"}, {"role": "user", "content": "x"}]}',
            r"p\.jsonl:1: a role: half of a surrogate pair at character 1, .*: remove it",
        ),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}',
            r"p\.jsonl:1: what comes with a message: half of a surrogate pair at character \d+, .*: remove it",
        ),
    ],
)
def test_prompt_files(
    name: str, content: bytes, wording: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(wording, refused(arguments(data__prompts=tmp_path / name)))


def test_parquet_without_prompts(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a"]}), tmp_path / "p.parquet")
    line = refused(arguments(data__prompts=tmp_path / "p.parquet"))
    assert re.search(r"p\.parquet:row 1: no prompt is recognised; its fields are: query", line)


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow"])
def test_tables_whose_texts_are_not_utf8(
    name: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    ends = pa.array([0, 3, 7], pa.int32()).buffers()[1]
    table = pa.table({"prompt": pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"teacaf\xe9"))})
    if name == "p.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    line = refused(arguments(data__prompts=tmp_path / name))
    assert re.search(rf"{re.escape(name)}: .*after row [01] .*: write (it|the data set) anew$", line), line


def test_no_prompts_at_all(arguments: Arguments, refused: Refused) -> None:
    assert refused(arguments(data__prompts=None)) == (
        "data.prompts is missing: set it in a config (--config FILE) or on the command line (--data.prompts VALUE)"
    )


def test_train_and_eval_overlap(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "Name a river"}, RECORDS[3]])
    assert refused(arguments(data__eval_prompts=held_out)) == (
        "1 of 2 prompts of data.eval_prompts are also in data.prompts (first: 'p3' = training prompt 'p3'): "
        "remove them on one side"
    )


def test_metric_reward_without_answers(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"id": "q", "prompt": "Name a river"}, *RECORDS])
    assert refused(arguments(data__prompts=prompts, **METRIC)) == (
        "1 of 13 prompts have no 'answer' (first: 'q'), which TorchmetricsReward compares with: add the column, "
        "or use another data.reward"
    )


# --------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"data__prompts": "missing.jsonl"}, r"data\.prompts='missing\.jsonl': no such file; check the path"),
        (
            {"data__prompts": "no-such-owner/no-such-set"},
            r"data\.prompts='no-such-owner/no-such-set' is neither a file here nor a dataset that the hub gave",
        ),
        ({"data__samples_per_prompt": 1}, r"data\.samples_per_prompt=1: a pair needs at least 2 responses"),
        ({"data__iterations": 0}, r"data\.iterations=0 must be at least 1"),
        ({"data__iterations": "three"}, r"^data\.iterations: expected int, got 'three'$"),
        ({"data__selection__fraction": 1.5}, r"Easiest\.fraction=1\.5 must lie in \(0, 1\]"),
        ({"data__selection__fraction": 0}, r"Easiest\.fraction=0\.0 must lie in \(0, 1\]"),
        ({"data__selection__fraction": -0.5}, r"Easiest\.fraction=-0\.5 must lie in \(0, 1\]"),
        (
            {"data__selection__fraction": "most"},
            r"^data\.selection\.fraction: expected float or list\[float\], got",
        ),
        (
            {
                "data__selection": "sppo_lightning.selection.DropHardest",
                "data__selection__fraction": 1.0,
            },
            r"data\.selection keeps 0 of 12 candidate prompts in iteration 0, .*: raise the fraction, add prompts",
        ),
        ({"data__selection__fraction": 0.001}, r"data\.selection keeps 0 of 12 candidate prompts"),
        ({"data__pairs_per_step": 5}, r"data\.pairs_per_step=5 is no multiple of data\.batch_size=2"),
        (
            {"trainer__precision": "bf16-true"},
            r"trainer\.precision=bf16-true .*: use bf16-mixed .* or 32-true",
        ),
        ({"trainer__accelerator": "no-such-thing"}, r"accelerator.*no-such-thing"),
        (
            {"model__policy__quantization": "nf4"},
            r"model\.policy\.quantization=nf4 .*: set model\.policy\.lora too",
        ),
        (
            {"model__policy__lora__rank": 4},
            r"^model\.policy\.lora needs rank and alpha \(or adapter, to start from one\): set model\.policy\.lora"
            r"\.alpha$",
        ),
        (
            {**LORA, "model__policy__lora__target_modules": '["query"]'},
            r"^model\.policy\.lora\.target_modules: .*query.* not found in the base model",
        ),
        (
            {**LORA, "model__policy__lora__target_modules": '["q_proj", "query"]'},
            r"^model\.policy\.lora\.target_modules: 'query' matches no layer of the model; what the others match: "
            "q_proj$",
        ),
        (
            {"model__policy__lora__adapter": "no/such/adapter"},
            r"^model\.policy\.lora\.adapter='no/such/adapter' cannot be read as an adapter .*: give a folder with",
        ),
        (
            {"model__policy__attn_implementation": "flash_attention_9"},
            r"^model\.policy\.attn_implementation=flash_attention_9 does not serve this model here .*: leave it out$",
        ),
        (
            {"model__policy__chat_template": "no-such.jinja"},
            r"^model\.policy\.chat_template='no-such\.jinja' cannot be read .*: name a Jinja file, or plain$",
        ),
        (
            {"model__reference": None},
            r"^model\.reference is missing: set it in a config .*--model\.reference VALUE",
        ),
        ({"model__loss__beta": None}, r"^model\.loss\.beta is missing: set it"),
        (
            {"model__reference": "first"},
            r"^model\.reference: expected one of 'previous_iteration', 'initial', got",
        ),
        ({"seed_everything": "true"}, r"seed_everything=True must be a number from 0 to 4294967295"),
        ({"seed_everything": -1}, r"seed_everything=-1 must be a number from 0 to 4294967295"),
        ({"data__seed": 7}, r"data\.seed=7 would break the self-play loop: set seed_everything instead"),
        (
            {**METRIC, "data__reward__output": "f2"},
            r"TorchmetricsReward\.output='f2': SQuAD gives exact_match, f1",
        ),
        (
            {**METRIC, "data__reward__output": None},
            r"TorchmetricsReward\.output=None: SQuAD gives exact_match, f1",
        ),
        (
            {**METRIC, "data__reward__metric": "torchmetrics.text.CharErrorRate"},
            r"TorchmetricsReward\.output='f1': CharErrorRate gives one number: leave it out",
        ),
        (
            {**METRIC, "data__reward__metric": "torchmetrics.MeanMetric", "data__reward__output": None},
            r"data\.reward\.metric: MeanMetric does not compare two texts .*: use a metric of torchmetrics\.text",
        ),
        (
            {**METRIC, "data__reward__metric": "torchmetrics.Accuracy"},
            r"^data\.reward\.metric\.task is missing: set it",
        ),
        ({"ckpt_path": "missing.ckpt"}, r"ckpt_path='missing\.ckpt': no such file; check the path"),
        ({"ckpt_path": __file__}, r"ckpt_path='.*test_bad_input\.py' is no checkpoint, or was cut short"),
        ({"weights_only": "false"}, r"weights_only=false would run code from a checkpoint: leave it out"),
    ],
)
def test_values(changes: dict[str, Any], wording: str, arguments: Arguments, refused: Refused) -> None:
    line = refused(arguments(**changes))
    assert re.search(wording, line), line


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        (
            {"data__reward": "no.such.Class", "data__reward__function": None},
            r"^data\.reward: there is no class 'no\.such\.Class' \(No module named 'no'\); give its full dotted",
        ),
        (
            {"data__selection": "sppo_lightning.selection.Easyest"},
            r"^data\.selection: there is no class 'sppo_lightning\.selection\.Easyest' "
            r".*; did you mean sppo_lightning\.selection\.Easiest\?$",
        ),
        (
            {"data__reward": "sppo_lightning.selection.All", "data__reward__function": None},
            r"^data\.reward: sppo_lightning\.selection\.All is not a Reward: give the class path of a Reward$",
        ),
        (
            {"data__selection": "sppo_lightning.rewards.FunctionReward"},
            r"^data\.selection: sppo_lightning\.rewards\.FunctionReward is not a Selection",
        ),
        (
            {"data__reward": "sppo_lightning.rewards.Reward", "data__reward__function": None},
            r"^data\.reward: sppo_lightning\.rewards\.Reward is abstract: give a class that derives from it$",
        ),
        (
            {"data__reward": "Praise", "data__reward__function": None},
            r"^data\.reward: 'Praise' is no class path: give one such as package\.module\.Class",
        ),
        (
            {"data__reward__function": "support.runs.no_such_function"},
            r"^data\.reward\.function: 'support\.runs\.no_such_function' is no function \(module '[a-z.]*' has no",
        ),
        (
            {"trainer__callbacks": '[{"class_path": "sppo_lightning.callbacks.PolicyExprt"}]'},
            r"^trainer\.callbacks: there is no class .*; did you mean sppo_lightning\.callbacks\.PolicyExport\?$",
        ),
    ],
)
def test_class_paths(changes: dict[str, Any], wording: str, arguments: Arguments, refused: Refused) -> None:
    line = refused(arguments(**changes))
    assert re.search(wording, line), line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"trainer__logger": "lightning.pytorch.loggers.WandbLogger"},
            r"trainer\.logger: lightning\.pytorch\.loggers\.WandbLogger needs wandb\S*, which is not installed here: "
            r"pip install 'sppo-lightning\[wandb\]'",
        ),
        (
            {"trainer__logger": '[{"class_path": "lightning.pytorch.loggers.WandbLogger"}]'},
            r"trainer\.logger\[0\]: lightning\.pytorch\.loggers\.WandbLogger needs wandb\S*, which is not installed .*",
        ),
        (
            {"data__reward": "at_once.Praise", "data__reward__function": None},
            r"data\.reward: at_once\.Praise needs no_such_package, which is not installed here: install it, or .*",
        ),
        (
            {"data__reward": "later.Praise", "data__reward__function": None},
            r"data\.reward: later\.Praise needs no_such_package, which is not installed here: install it, or .*",
        ),
        (
            {"data__reward__function": "at_once.praise"},
            r"data\.reward\.function: at_once\.praise needs no_such_package, which is not installed here: .*",
        ),
    ],
)
def test_classes_whose_package_is_missing(
    changes: dict[str, Any],
    line: str,
    arguments: Arguments,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "at_once.py").write_text("import no_such_package\n")
    (tmp_path / "later.py").write_text(
        "from sppo_lightning.rewards import Reward\n"
        "class Praise(Reward):\n"
        "    def __init__(self) -> None:\n"
        "        import no_such_package\n"
        "    def score(self, prompts, responses):\n"
        "        return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("at_once", "later"):
        sys.modules.pop(name, None)
    found = refused(arguments(**changes))
    assert re.fullmatch(line, found), found


def test_a_module_that_does_not_parse(
    arguments: Arguments, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfinished.py").write_text("\ndef praise(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(arguments(data__reward__function="unfinished.praise"))
    assert line == f"{tmp_path / 'unfinished.py'}:2: invalid syntax: correct that line"


# --------------------------------------------------------------------- models


def test_model_paths(arguments: Arguments, refused: Refused, weightless: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    for name, config in (("empty", None), ("corrupt", '{"model_type": '), ("typeless", "{}")):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    wordings = {
        tmp_path / "missing": "no such model; give a model folder, a hub id or a .gguf file",
        Path("a/b/missing-too"): "no such model; give a model folder, a hub id or a .gguf file",
        Path("missing-too"): "cannot be read as a model (",
        Path("no-such-owner/no-such-model"): "cannot be read as a model (",
        text: "is a file but not .gguf: give the model's folder",
        tmp_path / "empty": "the folder has no config.json, so it holds no model",
        tmp_path / "corrupt": "cannot be read as a model (",
        tmp_path / "typeless": "cannot be read as a model (",
    }
    for path, wording in wordings.items():
        line = refused(arguments(model__policy__pretrained=path))
        assert line.startswith(f"model.policy.pretrained={str(path)!r}")
        assert wording in line


def changed_tokenizer(folder: Path, tokenizer: Any) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        path.unlink()
    tokenizer.save_pretrained(folder)


def test_tokenizers_that_do_not_fit(
    arguments: Arguments, refused: Refused, weightless: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(weightless, policy)
    grown = byte_tokenizer()
    grown.add_tokens(["<extra>"])
    changed_tokenizer(policy, grown)
    given = arguments(model__policy__pretrained=policy)
    assert refused(given) == (
        "model.policy.pretrained: the tokenizer has 260 tokens, the model's embedding 259 rows: save the tokenizer "
        "that belongs to the model beside it, or the model with its embedding resized"
    )
    changed_tokenizer(policy, byte_tokenizer(chat_template=None))
    assert refused(given) == (
        "the policy's tokenizer has no chat template: name a Jinja file with model.policy.chat_template, or set "
        "model.policy.chat_template=plain to send prompts as plain text"
    )


@pytest.mark.parametrize(
    ("file", "content", "wording"),
    [
        ("tokenizer.json", "{}", r"has no tokenizer that can be read \(.*\): save the tokenizer"),
        ("tokenizer.json", "[]", r"has no tokenizer that can be read \(.*\): save the tokenizer"),
        ("tokenizer_config.json", "null", r"has no tokenizer that can be read \(.*\): save the tokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, r"has no tokenizer that can be read \("),
        ("tokenizer_config.json", {"eos_token": ["a"]}, r"has no tokenizer that can be read \(.*eos_token"),
        ("tokenizer_config.json", {"model_max_length": "x"}, r"has no tokenizer that can be read \("),
        (
            "tokenizer_config.json",
            {"chat_template": 5},
            r"the tokenizer's chat template is no text but 5: save",
        ),
        (
            "config.json",
            {"hidden_act": "x"},
            r"no model can be made as its config says \(KeyError: 'x'\): fetch",
        ),
        (
            "config.json",
            {"head_dim": 0},
            r"no model can be made as its config says \(ZeroDivisionError: .*\): fetch",
        ),
        (
            "config.json",
            {"pad_token_id": 10**9},
            r"no model can be made as its config says \(AssertionError: ",
        ),
        (
            "config.json",
            {"architectures": 5},
            r"cannot be read as a model \(('int' object is not iterable|Validation error for field 'architectures')",
        ),
        (
            "config.json",
            {"num_hidden_layers": 10**9},
            r"says num_hidden_layers=1000000000, which no model has",
        ),
        ("config.json", {"text": {"num_labels": 10**9}}, r"says num_labels=1000000000, which no model has"),
        ("generation_config.json", "{", r"generation_config\.json cannot be read \(.*\): fetch it again"),
        ("generation_config.json", "[]", r"generation_config\.json is no JSON object: fetch it again"),
        (
            "generation_config.json",
            {"eos_token_id": [1, 10**12]},
            r"generation_config\.json names the end token 1000000000000, but the model has the ids 0 to 258: correct",
        ),
        (
            "generation_config.json",
            {"eos_token_id": "x"},
            r"names the end token 'x', but the model has the ids",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [[1]]},
            r"names the end token \[1\], but the model has the ids",
        ),
        (
            "config.json",
            {"eos_token_id": -1},
            r"config\.json names the end token -1, but the model has the ids",
        ),
    ],
)
def test_model_folders_of_an_enemy(
    file: str,
    content: str | dict[str, Any],
    wording: str,
    arguments: Arguments,
    refused: Refused,
    weightless: Path,
    tmp_path: Path,
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(weightless, policy)
    path = policy / file
    if isinstance(content, dict):
        if "chat_template" in content:
            (policy / "chat_template.jinja").unlink()
        before = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps({**before, **content})
    path.write_text(content)
    line = refused(arguments(model__policy__pretrained=policy))
    assert line.startswith(f"model.policy.pretrained={str(policy)!r}")
    assert re.search(wording, line), line


def test_an_adapter_in_place_of_its_base(
    arguments: Arguments, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "is an adapter: give its base model here, and the adapter with model.policy.lora.adapter"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = refused(arguments(model__policy__pretrained=adapter))
    assert found == f"model.policy.pretrained={str(adapter)!r} {advice}"
    cache = tmp_path / "hub/models--own--adapter"  # one of the hub, as it lies in the cache
    shutil.copytree(adapter, cache / "snapshots/1")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert refused(arguments(model__policy__pretrained="own/adapter")) == (
        f"model.policy.pretrained='own/adapter' {advice}"
    )


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.mark.parametrize(
    ("template", "system", "line"),
    [
        (
            REFUSES_SYSTEM,
            "Be brief.",
            "the model's chat template has no place for data.system_prompt: leave it out, or",
        ),
        (
            "{{ messages[-1].content }}",
            "Be brief.",
            "the model's chat template has no place for data.system_prompt: leave it out, or put its text into the",
        ),
        ("{% for", None, "the model's chat template fails (TemplateSyntaxError: "),
        ("{% if messages %}{{ 1 | nothing }}{% endif %}", None, "the model's chat template fails (Template"),
        ("{{ messages[9].content }}", "Be brief.", "the model's chat template fails (UndefinedError: "),
        (
            "Hello.",
            None,
            "the model's chat template makes the same of all prompts, whatever they say: name another",
        ),
    ],
)
def test_advice_on_a_template_fits_its_fault(
    template: str, system: str | None, line: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    """No other messages mend it, and no prompt is at fault where the system prompt is."""
    (tmp_path / "t.jinja").write_text(template)
    found = refused(arguments(model__policy__chat_template=tmp_path / "t.jinja", data__system_prompt=system))
    assert line in found
    assert "change the messages" not in found
    assert "fails" not in found or found.endswith("name another one with model.policy.chat_template")
    assert "system_prompt" not in line or found.startswith(line)


def test_advice_on_the_template_of_a_reward_model(
    tiny_policy: Path, tiny_reward_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward"
    shutil.copytree(tiny_reward_model, reward)
    (reward / "chat_template.jinja").write_text("{{ messages[9].content }}")
    changes: dict[str, Any] = {"data__reward__function": None, "data__reward__pretrained": reward}
    changes |= {"data__reward": "sppo_lightning.rewards.SequenceClassificationReward"}
    prompts = write(tmp_path / "p.jsonl", RECORDS)
    with pytest.raises(SystemExit):
        main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "run", **changes)])
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(
        r"the chat template of \S+pretrained='.*reward' fails \(UndefinedError: .*\): correct it in", last
    )


@pytest.mark.parametrize("rank", [10**9, 10**20, 260])
def test_a_rank_that_no_matrix_has(rank: int, arguments: Arguments, refused: Refused) -> None:
    assert refused(arguments(model__policy__lora__rank=rank, model__policy__lora__alpha=1)) == (
        f"model.policy.lora.rank: {rank} is no rank for this model: give a number from 1 to 259, the size of its "
        "largest matrix"
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_without_bitsandbytes_or_on_another_device(
    arguments: Arguments, refused: Refused, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(**LORA, model__policy__quantization=kind)
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda", "xpu"})
    assert refused(given) == (
        f"model.policy.quantization={kind}: bitsandbytes does not know the device 'cpu', only cuda, xpu: choose "
        "another trainer.accelerator, or set quantization: none"
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refused(given).startswith(
        f"model.policy.quantization={kind} needs bitsandbytes, which cannot be imported here ("
    )


def test_a_language_model_is_no_reward_model(
    arguments: Arguments, refused: Refused, weightless: Path
) -> None:
    changes: dict[str, Any] = {
        "data__reward": "sppo_lightning.rewards.SequenceClassificationReward",
        "data__reward__function": None,
        "data__reward__pretrained": weightless,
    }
    line = refused(arguments(**changes))
    assert re.search(
        r"data\.reward.*pretrained='.*' is a LlamaForCausalLM, not a sequence-classification", line
    )


# ----------------------------------------------------------------- run folder


def test_a_rank_of_another_job(
    arguments: Arguments, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for a helper of a run, which writes neither config nor policy."""
    monkeypatch.setenv("RANK", "1")
    assert refused(arguments()).startswith(
        "RANK=1 is set in the environment, but no launcher runs this command ("
    )


def test_run_folder_that_cannot_be_written(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    below_a_file = tmp_path / "good.jsonl" / "run"
    assert refused(arguments(trainer__default_root_dir=below_a_file)) == (
        f"trainer.default_root_dir={str(below_a_file)!r} cannot be written (Not a directory): choose another folder"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.yaml", "pipe"),
        ("metrics.csv", "pipe"),
        ("checkpoints/last.ckpt", "pipe"),
        ("iterations/000/manifest.json", "pipe"),
        ("evaluations/000/rollouts.parquet", "pipe"),
        ("iterations/000/pairs.parquet", "device"),
        ("evaluations/000/manifest.json", "pipe"),
        ("config.yaml", "folder"),
        ("metrics.csv", "folder"),
        ("iterations/000/manifest.json", "folder"),
        ("iterations/000", "file"),
        ("evaluations", "file"),
        ("evaluations/000", "file"),
    ],
)
def test_run_folders_that_hold_another_kind(
    name: str, kind: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    """A pipe would be waited for, with no word of what for."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("x")
    wording = (
        rf"{re.escape(str(path))} is no (file|folder)(, which a run has there)?: move it away, or use another"
    )
    assert re.match(wording, refused(arguments()))


def test_a_config_of_a_run_that_unfolds(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    """A list that names the one before it ten times, eleven times over, is a hundred billion values."""
    lists = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("\n".join(lists))
    assert "config.yaml is damaged: restore it from a copy" in refused(arguments())
    (tmp_path / "c.yaml").write_text("\n".join(lists))
    shutil.rmtree(tmp_path / "run")
    line = refused([*arguments(), f"--config={tmp_path / 'c.yaml'}"])
    assert re.search(
        r"c\.yaml: a value cannot be read \(ValueError: it unfolds to more than 1,000,000 values\)", line
    )


@pytest.fixture(scope="module")
def finished(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of one iteration."""
    folder = tmp_path_factory.mktemp("finished")
    prompts = write(folder / "p.jsonl", RECORDS)
    main(["fit", *cli_arguments(tiny_policy, prompts, folder / "run", data__iterations=1)])
    return folder


def test_run_folder_of_another_config(
    finished: Path, tiny_policy: Path, arguments: Arguments, refused: Refused
) -> None:
    settings: dict[str, Any] = {"data__iterations": 1, "trainer__default_root_dir": finished / "run"}
    settings |= {"data__prompts": finished / "p.jsonl", "model__policy__pretrained": tiny_policy}
    with pytest.raises(WeightsReadError):  # the same config goes on, and so does another micro-batch
        main(arguments(**settings, data__batch_size=1))
    for key, before, now in (
        ("data__samples_per_prompt", "3", "4"),
        ("data__selection__fraction", "0.75", "0.5"),
        ("model__learning_rate", "0.001", "0.1"),
        ("seed_everything", "42", "7"),
    ):
        line = refused(arguments(**{**settings, key: now}))
        name = key.replace("__", ".").replace("selection.", "selection.init_args.")
        assert (
            f"{finished / 'run'} holds a run with {name}={before}, but this config has {now}: use another "
            in line
        )
        assert line.endswith("trainer.default_root_dir, or delete that folder")


def test_damaged_run_folder(
    finished: Path, tiny_policy: Path, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    settings: dict[str, Any] = {"data__iterations": 1, "trainer__default_root_dir": copy}
    settings |= {"data__prompts": finished / "p.jsonl", "model__policy__pretrained": tiny_policy}
    checkpoint = copy / "checkpoints/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert (
        "last.ckpt' is no checkpoint, or was cut short: restore it from a copy, or name another with"
        in refused(arguments(**settings))
    )
    (copy / "config.yaml").write_text("")
    assert (
        "config.yaml is damaged: restore it from a copy, or, if you are sure that this is the config"
        in refused(arguments(**settings))
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{}", "it lacks 'iteration'"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", ".*"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"iteration": "0"}', "'iteration' is '0'"),
        (b'{"iteration": 0}', "it lacks '[a-z_]+'"),
        (b'{"iteration": 0, "complete": "no"}', "'complete' is 'no'"),
        (b'{"iteration": 0, "complete": true, "metrics": {"a": "b"}}', r"'metrics' is \{'a': 'b'\}"),
    ],
)
def test_a_manifest_of_somebody_else(
    content: bytes,
    why: str,
    finished: Path,
    tiny_policy: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It says nothing of what a run writes; the policy's weights may have been read before it is looked at."""
    shutil.copytree(finished / "run/iterations", tmp_path / "run/iterations")
    shutil.copy(finished / "run/config.yaml", tmp_path / "run")
    manifest = tmp_path / "run/iterations/000/manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *cli_arguments(tiny_policy, finished / "p.jsonl", tmp_path / "run", data__iterations=1)])
    assert stop.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    wording = rf"sppo-lightning: error: {re.escape(str(manifest))} is damaged \({why}\), and nothing else says which .*"
    assert re.fullmatch(wording, line), line


# ------------------------------------------------------------ keys and configs


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--data.itertions=3", "data.itertions: no such key; did you mean data.iterations?"),
        ("--trainer.presicion=3", "trainer.presicion: no such key; did you mean trainer.precision?"),
        (
            "--data.selection.fractoin=1",
            "data.selection.fractoin: Easiest has no such setting; did you mean fraction?",
        ),
        (
            "--model.policy.lora.rnk=1",
            "model.policy.lora.rnk: LoRAConfig has no such setting; did you mean rank?",
        ),
        ("--zzz=1", "zzz: no such key; `sppo-lightning fit --help` lists them"),
        ("--data.iterations", "--data.iterations lacks its value: write --data.iterations VALUE"),
        ("stray", "'stray' is no option: options are written --KEY VALUE"),
    ],
)
def test_misspelt_flags(flag: str, line: str, arguments: Arguments, refused: Refused) -> None:
    assert refused([*arguments(), flag]) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("data: {itertions: 3}", "data.itertions: no such key; did you mean data.iterations?"),
        (
            "model: {policy: {pretraind: x}}",
            "model.policy.pretraind: no such key; did you mean model.policy.pretrained?",
        ),
        (
            "trainer: {callbacks: [{class_path: sppo_lightning.callbacks.SampleTable, init_args: {promts: 3}}]}",
            "trainer.callbacks.promts: SampleTable has no such setting; did you mean prompts?",
        ),
        (
            "data: {selection: {class_path: sppo_lightning.selection.All, init_args: {share: 3}}}",
            "data.selection.share: All has no such setting; it takes none",
        ),
    ],
)
def test_misspelt_config_keys(
    content: str, line: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert refused([*arguments(), f"--config={tmp_path / 'c.yaml'}"]) == line


@pytest.mark.parametrize("place", ["flag", "config"])
@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("max_epochs", 3, "data.iterations and data.epochs_per_iteration"),
        ("check_val_every_n_epoch", 3, "data.epochs_per_iteration"),
        ("max_steps", 10, "data.iterations and data.epochs_per_iteration"),
        ("max_time", "00:01:00:00", "by a signal instead"),
        ("limit_train_batches", 0.5, "data.schedule"),
        ("limit_val_batches", 0.5, "data.eval_prompts"),
        ("overfit_batches", 2, "data.prompts"),
        ("val_check_interval", 2, "data.eval_prompts"),
        ("accumulate_grad_batches", 2, "data.pairs_per_step and data.batch_size"),
        ("reload_dataloaders_every_n_epochs", 2, "data.epochs_per_iteration"),
    ],
)
def test_trainer_flags_that_break_the_loop(
    flag: str, value: float, instead: str, place: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"trainer": {flag: value}}))
    line = refused([*arguments(), f"--trainer.{flag}={value}" if place == "flag" else f"--config={config}"])
    assert line.startswith(f"trainer.{flag}={value} would break the self-play loop: ")
    assert instead in line


def test_a_seed_of_the_data_in_a_config(arguments: Arguments, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {seed: 7}")
    line = refused([*arguments(), f"--config={tmp_path / 'c.yaml'}"])
    assert line == "data.seed=7 would break the self-play loop: set seed_everything instead"


@pytest.mark.parametrize(
    ("content", "wording"),
    [
        ("data:\n  iterations: [3\n", r"c\.yaml:3: broken YAML, expected ',' or '\]'.*: correct that line"),
        ("data: {iterations: 3}\ndata: {batch_size: 1}\n", r"c\.yaml:2: broken YAML, 'data' stands twice"),
        ("- 3\n", r"c\.yaml: expected keys such as 'model:' and 'data:', got a list"),
        ("", r"c\.yaml: expected keys such as 'model:' and 'data:', got an empty file"),
        ("\x00", r"c\.yaml cannot be read: "),
        (None, r"--config .*c\.yaml: no such file; check the path \(it is relative to "),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_config_files(
    content: str | None, wording: str, joined: bool, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    if content is not None:
        config.write_text(content)
    flag = [f"--config={config}"] if joined else ["--config", str(config)]
    assert re.search(wording, refused([*arguments(), *flag]))


@pytest.mark.parametrize(
    ("content", "wording"),
    [
        (
            "data: {iterations: 3}".encode("utf-16"),
            r"c\.yaml:1: not UTF-8 \(byte 0\): save the file as UTF-8",
        ),
        (b'data: 1\nx: "caf\xe9"\n', r"c\.yaml:2: not UTF-8 \(byte 15\): save the file as UTF-8"),
        (b"? [a]\n: 1\n", r"c\.yaml:1: broken YAML, a key is no text: correct that line"),
        (b"1: 2\n", r"c\.yaml: expected keys such as 'model:' and 'data:', got 1"),
        (b"data: 2001-99-99\n", r"c\.yaml: a value cannot be read \(ValueError: month .*\): correct it"),
        (b"data: &a [*a]\n", r"c\.yaml: a value cannot be read \(ValueError: it unfolds to .*\): correct it"),
        (b"data: " + b"[" * 5000, r"c\.yaml: a value cannot be read \(RecursionError: .*\): correct it"),
    ],
)
def test_config_files_that_are_no_text_or_no_values(
    content: bytes, wording: str, arguments: Arguments, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    line = refused([*arguments(), f"--config={tmp_path / 'c.yaml'}"])
    assert re.search(wording, line), line


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            [],
            "no command: give one of fit, validate, test, predict, estimate, e.g. sppo-lightning fit --config FILE",
        ),
        (
            ["fitt"],
            "argument subcommand: invalid choice: 'fitt' (choose from 'fit', 'validate', 'test', 'predict', "
            "'estimate')",
        ),
    ],
)
def test_commands(args: list[str], line: str, refused: Refused) -> None:
    assert refused(args) == line


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_need_their_prompts(command: str, arguments: Arguments, refused: Refused) -> None:
    key = {"validate": "eval", "test": "test", "predict": "predict"}[command]
    assert refused([command, *arguments()[1:]]) == f"data.{key}_prompts is not set: name a prompt file"


def test_the_real_command(arguments: Arguments, tmp_path: Path) -> None:
    """As a user types it, with a reward function in a file of the current folder."""
    (tmp_path / "praise.py").write_text("def praise(prompts, responses, metadata):\n    return []\n")
    args = arguments(data__reward__function="praise.praise", data__prompts="missing.jsonl")
    command = Path(sys.executable).with_name("sppo-lightning")
    done = subprocess.run([command, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "sppo-lightning: error: data.prompts='missing.jsonl': no such file; check the path (it is relative to "
        f"{tmp_path})"
    )


# -------------------------------------------------------------- during the run


def constant_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [1.0] * len(responses)


def nan_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float("nan")] * len(responses)


def some_nan_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    scores = letter_reward(prompts, responses, metadata)
    lost = {"p0": float("nan"), "p5": float("inf")}
    return [lost.get(fields["id"], score) for fields, score in zip(metadata, scores, strict=True)]


def short_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [1.0]


def raising_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [fields["grade"] for fields in metadata]


def overflowing_reward(prompts: list[str], responses: list[str], metadata: list[Any]) -> list[float]:
    return [10.0**400 for _ in responses]


def huge_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[int]:
    return [10**5000] * len(responses)


def text_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[str]:
    return ["0.5"] * len(responses)


def none_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> None:
    return None


def tensor_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
    return torch.ones(len(responses), 2)


def dict_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> dict[int, float]:
    return dict(enumerate(map(len, responses)))


def ending_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    sys.exit(0)


def painted_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    raise ValueError("\x1b]52;c;cm0gLXJm\x07 \x1b[2J")


@pytest.mark.parametrize(
    ("function", "wording"),
    [
        ("dict_reward", r"returned a dict: it must return a list of numbers"),
        ("ending_reward", r"20 of 20 responses are of no use \(20 failed_score\), .* raised SystemExit: 0"),
        ("painted_reward", r"20 of 20 .* raised ValueError: \\x1b\]52;c;cm0gLXJm\\x07 \\x1b\[2J \("),
        (
            "constant_reward",
            r"iteration 0 has 0 pairs, fewer than one optimizer step of data\.pairs_per_step=4; "
            r"of 12 prompts were dropped: 9 tied_rewards, 3 not_selected",
        ),
        (
            "nan_reward",
            r"20 of 20 responses are of no use \(20 non_finite_reward\), over data\.max_failed_share=0\.5: correct",
        ),
        ("short_reward", r"returned 1 rewards for 10 responses: it must return one for each"),
        (
            "raising_reward",
            r"20 of 20 responses are of no use \(20 failed_score\), .*; the first error: data\.reward FunctionReward "
            r"raised KeyError: 'grade' \(.*test_bad_input\.py:\d+, in \S+\): correct the cause",
        ),
        (
            "overflowing_reward",
            r"20 of 20 responses are of no use \(20 failed_score\), .* raised OverflowError: .*: correct the cause",
        ),
        (
            "huge_reward",
            r"20 of 20 responses are of no use \(20 non_finite_reward\), over data\.max_failed_share=0\.5: correct",
        ),
        ("text_reward", r"returned '0\.5', which is no number: it must return one number a response"),
        ("none_reward", r"returned a NoneType: it must return a list of numbers"),
        ("tensor_reward", r"returned tensor\(.*\), which is no number: it must return one number a response"),
    ],
)
def test_rewards_that_break_their_contract(
    function: str, wording: str, tiny_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"data__reward__function": f"{__name__}.{function}"}
    changes |= {"data__generator__max_new_tokens": 2, "trainer__enable_progress_bar": "false"}
    prompts = write(tmp_path / "p.jsonl", RECORDS)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "run", **changes)])
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert "\x1b" not in printed.err + printed.out
    lines = printed.err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert [line for line in lines if "error:" in line] == lines[-1:]
    assert re.match("sppo-lightning: error: (data.reward FunctionReward )?" + wording, lines[-1]), lines[-1]


def test_a_reward_model_that_reads_too_little(
    tiny_policy: Path, tiny_reward_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer says so, wrongly perhaps."""
    reward = tmp_path / "short-reward"
    shutil.copytree(tiny_reward_model, reward)
    settings = json.loads((reward / "tokenizer_config.json").read_text())
    (reward / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 7}))
    changes: dict[str, Any] = {"data__generator__max_new_tokens": 2, "data__reward__function": None}
    changes |= {"data__reward": "sppo_lightning.rewards.SequenceClassificationReward"}
    changes |= {"data__reward__pretrained": reward}
    prompts = write(tmp_path / "p.jsonl", RECORDS)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "run", **changes)])
    assert stop.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "20 of 20 responses are of no use (20 too_long_to_score)" in line
    assert re.search(
        r"a conversation has \d+ tokens, and '.*short-reward' reads 7 \(its tokenizer's model_max_length\): set the "
        "reward's max_tokens",
        line,
    ), line


def test_some_non_finite_rewards_drop_their_prompts(tiny_policy: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", RECORDS)
    changes = {"data__reward__function": f"{__name__}.some_nan_reward", "data__iterations": 1}
    changes["data__selection"] = "sppo_lightning.selection.All"
    changes["data__selection__fraction"] = None
    main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "run", **changes)])
    iteration = tmp_path / "run/iterations/000"
    manifest = json.loads((iteration / "manifest.json").read_text())
    assert manifest["dropped"]["non_finite_reward"] == 2
    assert manifest["counts"]["pairs"] + sum(manifest["dropped"].values()) == 12
    pairs = pq.read_table(iteration / "pairs.parquet").column("prompt_id").to_pylist()
    assert len(pairs) == manifest["counts"]["pairs"]
    assert not {"p0", "p5"} & set(pairs)


# ------------------------------------------------- settings that do not go together


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        (
            {"trainer__strategy": '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'},
            "ModelParallelStrategy with data_parallel_size=auto, tensor_parallel_size=auto for 1 processes",
        ),
        (
            {"trainer__strategy": "lightning.pytorch.strategies.ModelParallelStrategy"},
            "ModelParallelStrategy with data_parallel_size=auto, tensor_parallel_size=auto for 1 processes",
        ),
        (
            {"trainer__strategy": "fsdp"},
            "strategy=fsdp is not supported: use one device or ddp; for a model larger than a device FSDP2: strategy: "
            "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: 1, "
            "tensor_parallel_size: 1}}",
        ),
        (
            {"trainer__strategy": '{"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"}'},
            "trainer.strategy=DeepSpeedStrategy is not supported: use one device or ddp",
        ),
        (
            {"model__optimizer": "torch.optim.AdamW", "model__optimizer__lr": 0.5},
            "model.optimizer.init_args.lr=0.5 would be overridden: set model.learning_rate instead",
        ),
        (
            {"model__optimizer": "torch.optim.AdamW", "model__optimizer__weight_decay": 0.5},
            "model.optimizer.init_args.weight_decay=0.5 would be overridden: set model.weight_decay instead",
        ),
        (
            {"data__generator__max_new_tokens": 500},
            "with 500 new ones more than the policy's context of 512: lower data.max_prompt_tokens",
        ),
        (
            {
                "data__pair_selection": "sppo_lightning.selection.Hardest",
                "data__pair_selection__fraction": 0.1,
            },
            "keeps",
        ),
    ],
)
def test_combinations(arguments: Arguments, refused: Refused, changes: dict[str, Any], wording: str) -> None:
    assert wording in refused(arguments(**changes))


def test_conversations_need_a_reward_model_with_a_chat_template(
    arguments: Arguments, refused: Refused, tiny_reward_model: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain-reward"
    shutil.copytree(tiny_reward_model, plain)
    (plain / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [
        json.dumps({"messages": [*turns, {"role": "user", "content": f"c{n}"}]}) + "\n" for n in range(12)
    ]
    (tmp_path / "turns.jsonl").write_text("".join(lines))
    changes: dict[str, Any] = {
        "data__prompts": tmp_path / "turns.jsonl",
        "data__reward": "sppo_lightning.rewards.SequenceClassificationReward",
        "data__reward__function": None,
        "data__reward__pretrained": plain,
    }
    line = refused(arguments(**changes))
    assert "has several messages, but the reward model" in line
    assert "has no chat template and reads one text: use single prompts" in line
