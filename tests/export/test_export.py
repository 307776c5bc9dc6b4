"""``sppo-lightning export``, on tiny runs made by the real command."""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from sppo_lightning.__main__ import main as command
from sppo_lightning.export import (
    Exporter,
    GGUFReadyModel,
    HFModel,
    MergedModel,
    PEFTAdapter,
    SavedPolicy,
    logps,
    saved_policy,
)
from sppo_lightning.export import command as export_command
from sppo_lightning.export.check import Check, Distance, compared, compared_with_stored
from sppo_lightning.export.command import export, main
from sppo_lightning.export.finished_run import open_run
from sppo_lightning.export.formats import name_end_tokens
from sppo_lightning.export.logps import float32_products, own_dtype_logps, response_logps
from sppo_lightning.policy import merging
from sppo_lightning.policy.pretrained import quantization_options
from sppo_lightning.types import PreferencePair, UserError

IDS = torch.arange(3, 40)[None]
LORA = {"model.policy.lora.rank": 4, "model.policy.lora.alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "full": {
        "data.iterations": 2,
        "trainer.callbacks": '[{"class_path": "sppo_lightning.callbacks.PolicyExport", '
        '"init_args": {"keep_every_iteration": true}}]',
    },
    "lora": LORA,
    "longer": {**LORA, "data.iterations": 2},
    "from-start": {**LORA, "data.iterations": 2, "model.reference": "initial"},
    "dora": {**LORA, "model.policy.lora.dora": "true", "model.policy.lora.rslora": "true"},
    "nf4": {**LORA, "model.policy.quantization": "nf4", "trainer.precision": "bf16-mixed"},
}
Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with two end tokens, as a HF folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=True))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 7])
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes a run of a kind, once."""
    root = tmp_path_factory.mktemp("runs")
    prompts = root / "train.jsonl"
    prompts.write_text("".join(f'{{"id": "t{n}", "prompt": "Count to {n}"}}\n' for n in range(12)))

    def run(kind: str) -> Path:
        if not (root / kind).exists():
            settings = {"data.iterations": 1, "model.learning_rate": 1e-2, **KINDS[kind]}
            command(["fit", *cli_arguments(base, prompts, root / kind, **settings)])
        return root / kind

    return run


@pytest.fixture
def copied(run_of: Run, tmp_path: Path) -> Run:
    """Makes a copy of a run, to be spoilt."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(run_of(kind), tmp_path / kind))

    return copy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(input_ids=IDS, use_cache=False).logits
    return found


def adapted(base: Path, run: Path) -> Any:
    """The run's adapter on its base, in float32 products."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(plain, run / "policy")


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


# -------------------------------------------------------------------- formats


def test_a_fully_trained_model_leaves_whole(run_of: Run, tmp_path: Path) -> None:
    run = run_of("full")
    folder = export(str(run), HFModel(), output=str(tmp_path / "out"))
    found, trained = whole(folder).state_dict(), whole(run / "policy").state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in found.items())
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7]
    assert whole(folder).config.use_cache
    conversation = [{"role": "user", "content": "Count to 3"}]
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, run / "policy"))
    assert ours.apply_chat_template(conversation) == theirs.apply_chat_template(conversation)
    assert "| the export and the trained policy | 0 |" in card_of(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_dtype_is_rounded_to(run_of: Run, tmp_path: Path) -> None:
    run = run_of("full")
    folder = export(str(run), HFModel(), output=str(tmp_path / "out"), dtype="bfloat16")
    exact = whole(run / "policy").state_dict()
    for name, value in whole(folder).state_dict().items():
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name
    assert "that computing in 16 bits changes | passed |" in card_of(folder)


def test_an_earlier_iteration_that_was_kept(run_of: Run, tmp_path: Path) -> None:
    run = run_of("full")
    folder = export(str(run), HFModel(), output=str(tmp_path / "out"), iteration=0)
    found, kept = whole(folder).state_dict(), whole(run / "policies/000").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in found.items())
    assert "| iterations | 1 of 2 |" in card_of(folder)


@pytest.mark.parametrize("kind", ["lora", "nf4", pytest.param("dora", marks=pytest.mark.slow)])
def test_merged_weights_give_what_the_adapter_gives_on_the_plain_base(
    run_of: Run, base: Path, tmp_path: Path, kind: str
) -> None:
    run = run_of(kind)
    folder = export(str(run), MergedModel(), output=str(tmp_path / "out"), dtype="float32")
    model = adapted(base, run)
    expected = logits(model)
    torch.testing.assert_close(logits(whole(folder)), expected, atol=1e-3, rtol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7]


def test_merged_weights_get_the_dtype_of_the_base(run_of: Run, base: Path, tmp_path: Path) -> None:
    folder = export(str(run_of("lora")), MergedModel(), output=str(tmp_path / "out"))
    found, own = whole(folder).state_dict(), whole(base).state_dict()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    untouched = [name for name in found if "_proj" not in name]
    assert all(torch.equal(found[name], own[name]) for name in untouched)


def test_an_adapter_leaves_in_a_layout_that_others_read(run_of: Run, base: Path, tmp_path: Path) -> None:
    run = run_of("lora")
    folder = export(str(run), PEFTAdapter(), output=str(tmp_path / "out"))
    expected = logits(adapted(base, run))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    # transformers rounds the adapter to the base's bfloat16
    torch.testing.assert_close(logits(whole(folder)), expected, atol=5e-3, rtol=0)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7]
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    # what vLLM's loader asks for
    assert settings["r"] == 4
    assert settings["lora_alpha"] == 8
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    assert settings["bias"] == "none"
    for name in load_file(folder / "adapter_model.safetensors"):
        assert name.startswith("base_model.model.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))


def test_a_dora_adapter_is_read_by_peft_and_says_what_does_not_read_it(
    run_of: Run, base: Path, tmp_path: Path
) -> None:
    run = run_of("dora")
    folder = export(str(run), PEFTAdapter(), output=str(tmp_path / "out"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(adapted(base, run)))
    assert "This is a DoRA adapter. vLLM serves none" in card_of(folder)


def test_a_quantised_run_is_compared_with_what_quantisation_alone_does(run_of: Run, tmp_path: Path) -> None:
    folder = export(str(run_of("nf4")), PEFTAdapter(), output=str(tmp_path / "out"))
    card = card_of(folder)
    assert "between the two bases alone | passed |" in card
    assert "The adapter was trained on its base in nf4" in card


def test_what_the_gguf_converter_looks_for(run_of: Run, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    (own / "tokenizer.model").write_bytes(b"vocabulary")
    run = Path(shutil.copytree(run_of("lora"), tmp_path / "run"))
    change_base(run, own)
    folder = export(str(run), GGUFReadyModel(), output=str(tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "rope_scaling" not in config
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert (folder / "tokenizer.json").exists()
    assert (folder / "tokenizer.model").read_bytes() == b"vocabulary"
    assert (folder / "model.safetensors").exists()
    assert "python convert_hf_to_gguf.py path/to/this/folder" in card_of(folder)


# ------------------------------------------------------------------ the check


def test_a_wrong_merge_is_noticed_and_the_folder_keeps_its_name(
    run_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(layer: Any) -> torch.Tensor:
        weight = layer.get_base_layer().weight
        delta: torch.Tensor = 2 * layer.get_delta_weight("default")
        return weight.float() + delta

    for module in (merging, logps, saved_policy):
        monkeypatch.setattr(module, "merged_weight", doubled)
    place = tmp_path / "out"
    expected = (
        r"^the export is not the trained policy: the merged weights, before rounding, and the adapter on the same "
        r"base differ by .* nat per token, allowed are 0\.0001 .*It stays in .*out\.unchecked to be looked at, not "
        r"used$"
    )
    with pytest.raises(UserError, match=expected):
        export(str(run_of("lora")), MergedModel(), output=str(place))
    assert not place.exists()
    assert "FAILED" in card_of(tmp_path / "out.unchecked")


def test_a_folder_of_somebody_else_is_not_removed(run_of: Run, tmp_path: Path) -> None:
    """The name of the unchecked export may be taken; ``out`` itself may not be there yet."""
    mine = tmp_path / "out.unchecked" / "notes.md"
    mine.parent.mkdir()
    mine.write_text("mine")
    message = (
        rf"^{re.escape(str(mine.parent))} is there, .*: delete it, or name another folder with --output$"
    )
    with pytest.raises(UserError, match=message):
        export(str(run_of("lora")), PEFTAdapter(), output=str(tmp_path / "out"))
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_weights_that_change_on_their_way_into_the_folder_are_noticed(
    run_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As little as one bit, which log-probs would not show."""
    write = MergedModel.write

    def spoil(exporter: MergedModel, policy: SavedPolicy, folder: Path) -> None:
        write(exporter, policy, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 4] ^= 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(MergedModel, "write", spoil)
    expected = (
        r"1 weights are not what was to be written, e\.g\. model\.layers\.1\.mlp\.up_proj\.weight\. It stays"
    )
    with pytest.raises(UserError, match=expected):
        export(str(run_of("lora")), MergedModel(), output=str(tmp_path / "out"))


def test_another_adapter_than_the_runs_is_noticed(
    run_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PEFTAdapter.write

    def spoil(exporter: PEFTAdapter, policy: SavedPolicy, folder: Path) -> None:
        write(exporter, policy, folder)
        place = folder / "adapter_model.safetensors"
        save_file({name: weight * 1.01 for name, weight in load_file(place).items()}, place)

    monkeypatch.setattr(PEFTAdapter, "write", spoil)
    with pytest.raises(UserError, match=r"the export and the run's adapter, on the same base differ by"):
        export(str(run_of("nf4")), PEFTAdapter(), output=str(tmp_path / "out"))


def test_what_training_moved_is_known_of_a_fresh_adapter_only(
    run_of: Run, base: Path, tmp_path: Path
) -> None:
    """The adapter that a run started from had moved the log-probs already."""
    moved = "training moved these log-probs by"
    assert moved in card_of(export(str(run_of("lora")), PEFTAdapter(), output=str(tmp_path / "fresh")))
    (tmp_path / "train.jsonl").write_text(
        "".join(f'{{"id": "t{n}", "prompt": "Count to {n}"}}\n' for n in range(12))
    )
    started = {"data.iterations": 1, "model.policy.lora.adapter": run_of("lora") / "policy"}
    command(["fit", *cli_arguments(base, tmp_path / "train.jsonl", tmp_path / "run", **started)])
    assert moved not in card_of(
        export(str(tmp_path / "run"), PEFTAdapter(), output=str(tmp_path / "started"))
    )


def test_rounding_that_buries_what_was_trained_is_said(
    copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied("lora")
    place = run / "policy/adapter_model.safetensors"
    weights = {n: w * 0.02 if "lora_B" in n else w for n, w in load_file(place).items()}
    save_file(weights, place)
    export(str(run), MergedModel(), output=str(tmp_path / "rounded"))
    assert "--dtype float32 keeps what was trained" in capsys.readouterr().err
    export(str(run), MergedModel(), output=str(tmp_path / "exact"), dtype="float32")
    assert capsys.readouterr().err == ""


def test_float32_products_are_those_of_a_float32_model(base: Path, run_of: Run) -> None:
    run = open_run(run_of("lora"))
    pairs = run.folder.iteration(0).read_pairs()[:2]
    model = adapted(base, run.folder.root)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = response_logps(model, pairs)
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert (found - own_dtype_logps(model, pairs)).abs().mean() > 1e-3
    assert torch.equal(found, own_dtype_logps(model.float(), pairs))


def test_float32_products_end_with_their_context_even_where_a_forward_fails(base: Path) -> None:
    model = whole(base)
    model.model.layers[1].self_attn.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of luck"), float32_products(model):
        model(input_ids=IDS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def failing(module: Any, args: Any) -> None:
    raise RuntimeError("out of luck")


@pytest.fixture(scope="module")
def another_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape, and of the same name, in another folder."""
    folder = tmp_path_factory.mktemp("others") / base.name
    shutil.copytree(base, folder)
    torch.manual_seed(1)
    other = LlamaForCausalLM(whole(base).config)
    other.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def test_a_relative_base_is_the_one_that_was_trained_on(
    copied: Run, base: Path, another_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("lora")
    change_config(run, lambda config: config["model"]["policy"].update(pretrained=base.name))
    monkeypatch.chdir(another_base.parent)
    folder = export(str(run), PEFTAdapter(), output=str(tmp_path / "out"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    assert f"base_model: {base.name}\n" in card_of(folder)


@pytest.mark.parametrize("format", [PEFTAdapter(), MergedModel()], ids=["adapter", "merged"])
@pytest.mark.parametrize("kind", ["lora", "nf4", "longer", "from-start"])
def test_another_base_of_the_same_shape_is_noticed(
    copied: Run, another_base: Path, tmp_path: Path, kind: str, format: Exporter
) -> None:
    run = copied(kind)
    change_base(run, another_base)
    expected = (
        r"^the base is not the one that the run was trained on: the base and the reference's log-probs that "
    )
    with pytest.raises(UserError, match=expected):
        export(str(run), format, output=str(tmp_path / "out"))
    assert "FAILED" in card_of(tmp_path / "out.unchecked")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (
            "lora",
            "iteration 0 | {} | 0.001: sums of whole responses, computed in float32 in training | passed |",
        ),
        (
            "dora",
            "iteration 0 | {} | 0.001: sums of whole responses, computed in float32 in training | passed |",
        ),
        (
            "nf4",
            "iteration 0 | {} | 0.05: sums of whole responses, computed in bfloat16 in training | passed |",
        ),
        (
            "longer",
            "iteration 0 | {} | 0.001: sums of whole responses, computed in float32 in training | passed |",
        ),
        (
            "from-start",
            "iteration 1 | {} | 0.001: sums of whole responses, computed in float32 in training |",
        ),
    ],
)
def test_what_training_stored_is_on_the_card(run_of: Run, tmp_path: Path, kind: str, row: str) -> None:
    card = card_of(export(str(run_of(kind)), PEFTAdapter(), output=str(tmp_path / "out")))
    before, after = row.split("{}")
    assert re.search(re.escape(before) + r"\S+" + re.escape(after), card), card


def test_nothing_is_compared_where_the_reference_was_more_than_the_base(copied: Run, tmp_path: Path) -> None:
    run = copied("lora")
    change_config(run, started)
    card = card_of(export(str(run), PEFTAdapter(), output=str(tmp_path / "out")))
    assert "that training stored" not in card
    again = copied("longer")
    (again / "iterations/000/pairs.parquet").unlink()
    assert open_run(again).base_as_reference is None
    assert open_run(copied("full")).base_as_reference is None


def started(config: Any) -> None:
    config["model"]["policy"]["lora"] = {"adapter": "some/adapter"}


def test_sums_against_what_was_stored() -> None:
    """|(1 + 2) - 2.5| + |4 - 5| = 1.5, over three tokens 0.5."""
    pair = PreferencePair("a", (1,), (2, 3), (4,), "", "", 1.0, 0.0, 2.5, 5.0)
    logps = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = compared_with_stored(logps, [pair], iteration=3, coarsest=torch.bfloat16)
    assert found.nats == pytest.approx(0.5)
    assert found.allowed == 0.05
    assert compared_with_stored(logps, [pair], iteration=3, coarsest=torch.float64).allowed == 1e-3


def test_four_bit_layers_compute_in_float32_too(base: Path, run_of: Run) -> None:
    """As float32 layers with the dequantised weights do."""
    from bitsandbytes.functional import dequantize_4bit

    pairs = open_run(run_of("lora")).folder.iteration(0).read_pairs()[:2]
    options = quantization_options("nf4", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=options)
    plain = whole(base).float()
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False
            state = copy.copy(layer.weight.quant_state)
            state.dtype = torch.float32
            plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, state)
    found = response_logps(model, pairs)
    torch.testing.assert_close(found, response_logps(plain, pairs), atol=1e-4, rtol=0)
    assert {layer.compute_dtype for layer in model.modules() if hasattr(layer, "compute_dtype")} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("kind", "format"), [("full", HFModel()), ("nf4", PEFTAdapter()), ("lora", MergedModel())]
)
def test_one_model_is_in_memory_at_a_time(
    run_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, format: Exporter
) -> None:
    run = str(run_of(kind))
    alive: WeakSet[torch.nn.Module] = WeakSet()
    before = []
    make = LlamaForCausalLM.__init__

    def counted(model: LlamaForCausalLM, *args: Any, **options: Any) -> None:
        before.append(len(alive))
        make(model, *args, **options)
        alive.add(model.model.layers[0])

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counted)
    gc.disable()  # a model in a circle of references would stay until it runs
    try:
        export(run, format, output=str(tmp_path / "out"))
    finally:
        gc.enable()
    assert before == [0] * (2 if kind == "full" else 3)


# ------------------------------------------------------- which iteration it is


def test_a_policy_ahead_of_its_checkpoint_says_its_own_iteration(copied: Run, tmp_path: Path) -> None:
    """As after a kill between the writing of ``policy/`` and of ``last.ckpt``."""
    run = copied("full")
    last = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["SelfPlayDataModule"]["finished"] -= 1
    torch.save(checkpoint, last)
    assert open_run(run).iteration == 1
    assert open_run(run, iteration=0).policy_folder == run / "policies/000"
    assert open_run(run, iteration=1).policy_folder == run / "policies/001"
    folder = export(str(run), HFModel(), output=str(tmp_path / "out"))
    assert not (folder / "run.json").exists()
    (run / "policy/run.json").unlink()
    assert open_run(run).iteration == 0, "an older folder has but the checkpoint to tell"
    state = last.rename(last.with_name("meta.pt"))
    last.mkdir()
    state.rename(last / "meta.pt")
    assert open_run(run).iteration == 0, "a sharded one as well"


def test_a_damaged_record_of_the_iteration(copied: Run) -> None:
    run = copied("full")
    (run / "policy/run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json is damaged \('iteration'\): delete it"):
        open_run(run)


def test_distances_and_their_allowances() -> None:
    """|1-0|, |2-4| -> 1.5; 1e-4 + 4 * 0.25 + 2 * 0.25 = 1.5001."""
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    found = compared("a and b", one, other, rounding=0.25, base=0.25)
    assert found.nats == pytest.approx(1.5)
    assert found.allowed == pytest.approx(1.5001)
    assert found.holds
    assert not compared("a and b", one, other, rounding=0.25).holds
    assert not Distance("a and b", float("nan"), 1.0, "anything").holds
    with pytest.raises(UserError, match=r"a and b differ by nan nat per token, allowed are 1 \(anything\)"):
        Check([], [found, Distance("a and b", float("nan"), 1.0, "anything")]).require(Path("x"))


# ------------------------------------------------------------------ bad input


def change_config(run: Path, change: Callable[[Any], None]) -> None:
    config = open_config(run)
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def change_base(run: Path, base: Path) -> str:
    """Let the run's adapter name another base; return the one that its config still names."""
    path = run / "policy/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return str(open_config(run)["model"]["policy"]["pretrained"])


def open_config(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml; give a folder that was a fit's"):
        export(str(tmp_path), HFModel())


def test_a_damaged_config(copied: Run) -> None:
    run = copied("lora")
    change_config(run, lambda config: config.pop("model"))
    with pytest.raises(UserError, match=r"config\.yaml cannot be read as a run's config \('model'\)"):
        export(str(run), PEFTAdapter())


def test_a_run_without_a_finished_iteration(copied: Run) -> None:
    run = copied("lora")
    shutil.rmtree(run / "policy")
    with pytest.raises(UserError, match=r"has no finished iteration yet, so that there is no policy"):
        export(str(run), PEFTAdapter())


def test_an_unknown_iteration(run_of: Run) -> None:
    with pytest.raises(UserError, match=r"holds no policy of iteration 5, only of 0, 1: name one of those"):
        export(str(run_of("full")), HFModel(), iteration=5)


def test_a_damaged_checkpoint(copied: Run) -> None:
    run = copied("lora")
    (run / "policy/run.json").unlink()
    (run / "checkpoints/last.ckpt").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        export(str(run), PEFTAdapter())


def test_formats_that_do_not_fit_the_run(run_of: Run) -> None:
    with pytest.raises(UserError, match=r"trained an adapter .*--format adapter .* or --format merged"):
        export(str(run_of("lora")), HFModel())
    for wrong in (PEFTAdapter(), MergedModel()):
        with pytest.raises(UserError, match=r"trained all weights .* there is no adapter: use --format hf"):
            export(str(run_of("full")), wrong)
    with pytest.raises(UserError, match=r"--dtype float16 is for full models: an adapter stays float32"):
        export(str(run_of("lora")), PEFTAdapter(), dtype="float16")


def test_a_folder_that_is_there_is_never_written_over(run_of: Run, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(UserError, match=r"out is there and not empty: name another folder with --output"):
        export(str(run_of("lora")), PEFTAdapter(), output=str(place))
    (place / "mine").unlink()
    assert export(str(run_of("lora")), PEFTAdapter(), output=str(place)) == place


def test_the_folder_that_one_is_in(run_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    place.mkdir()
    monkeypatch.chdir(place)
    assert export(str(run_of("lora")), PEFTAdapter(), output=".") == place
    assert Path("adapter_config.json").exists(), "it is the same folder still"
    assert list(tmp_path.iterdir()) == [place]


def test_a_base_that_is_gone(copied: Run, tmp_path: Path) -> None:
    run = copied("lora")
    named = change_base(run, tmp_path / "gone")
    expected = (
        rf"was trained on, \S*gone, cannot be read \(.*no such model.*\); config\.yaml names {named}, which "
        rf"from here is {named}\. If the base moved, correct base_model_name_or_path in \S*policy/adapter_config\.json"
    )
    with pytest.raises(UserError, match=expected):
        export(str(run), MergedModel())
    assert not list(run.glob("export-*"))


def test_a_folder_that_cannot_be_made(run_of: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--output \S+/file/out: the folder cannot be made \(Not a directory\)"
    ):
        export(str(run_of("lora")), PEFTAdapter(), output=str(tmp_path / "file/out"))


@pytest.mark.parametrize(
    ("kind", "format"), [("full", HFModel()), ("lora", PEFTAdapter()), ("lora", MergedModel())]
)
def test_whoever_may_read_new_files_may_read_weights(
    run_of: Run, tmp_path: Path, kind: str, format: Exporter
) -> None:
    (tmp_path / "new").touch()
    folders = [run_of(kind) / "policy", export(str(run_of(kind)), format, output=str(tmp_path / "out"))]
    modes = {path.name: path.stat().st_mode for folder in folders for path in folder.iterdir()}
    assert any(name.endswith(".safetensors") for name in modes)
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}


def test_a_device_that_is_not_there(run_of: Run) -> None:
    with pytest.raises(UserError, match=r"--device abacus cannot be used here"):
        export(str(run_of("lora")), PEFTAdapter(), device="abacus")


# -------------------------------------------------------------------- command


def test_the_command(run_of: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_of("lora")), "--format", "adapter", "--output", str(tmp_path / "out")])
    assert f"The exported policy lies in {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["hf", "adapter", "merged", "gguf-ready"])
def test_short_names_are_class_paths(
    format: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Exporter] = []
    monkeypatch.setattr(export_command, "open_run", lambda run, iteration: None)
    for kind in (HFModel, PEFTAdapter, MergedModel, GGUFReadyModel):
        monkeypatch.setattr(kind, "validate", lambda exporter, run, dtype: taken.append(exporter) or 1 / 0)
    for given in (["--format", format], [f"--format={format}"]):
        with pytest.raises(ZeroDivisionError):
            main(["run", *given])
    assert [exporter.name for exporter in taken] == [format] * 2


OWN = """
from pathlib import Path

from sppo_lightning.export import Exporter, GGUFReadyModel


class Ollama(Exporter):
    holds = "a full model with a Modelfile for Ollama"

    def __init__(self, temperature: float, top_p: float = 1.0) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be at least 0")
        self.temperature = temperature
        self.model = GGUFReadyModel()

    def write(self, policy, folder):
        self.model.write(policy, folder)
        (folder / "Modelfile").write_text(f"FROM .\\nPARAMETER temperature {self.temperature}\\n")

    def read_back(self, policy, folder):
        return self.model.read_back(policy, folder)

    def how_to_load(self, policy):
        yield "Run ollama create."


class Wrong(Ollama):
    def read_back(self, policy, folder):
        model = super().read_back(policy, folder)
        model.get_output_embeddings().weight.data *= 1.1
        return model


class PromptsOnly(Exporter):
    def write(self, policy, folder):
        (folder / "template.jinja").write_text(policy.tokenizer.chat_template)


class Abstract(Exporter):
    pass


class Other:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds a user's module of exporters."""
    (tmp_path / "own_exporters.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_exporters", raising=False)


@pytest.mark.usefixtures("own")
def test_an_exporter_of_the_users_own(copied: Run) -> None:
    run = copied("lora")
    command(["export", str(run), "--format", "own_exporters.Ollama", "--format.temperature=0.7"])
    folder = run / "export-Ollama"
    assert (folder / "Modelfile").read_text() == "FROM .\nPARAMETER temperature 0.7\n"
    card = card_of(folder)
    assert "This folder holds a full model with a Modelfile for Ollama." in card
    assert "## How to load it\n\nRun ollama create.\n\n## Check" in card
    assert "| the export and the trained policy |" in card
    assert "each matrix that the adapter changed was what had been written, bit by bit." in card


@pytest.mark.usefixtures("own")
def test_an_exporter_of_the_users_own_is_checked_as_ours_are(copied: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit:
        command(["export", str(copied("full")), "--format=own_exporters.Wrong", "--format.temperature=0.7"])
    assert exit.value.code == 2
    assert "FAILED: 1 weights in this folder" in card_of(tmp_path / "full/export-Wrong.unchecked")


@pytest.mark.usefixtures("own")
def test_an_export_that_is_not_read_back_says_so(copied: Run, tmp_path: Path) -> None:
    command(["export", str(copied("lora")), "--format=own_exporters.PromptsOnly", "--output=out"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"template.jinja", "README.md"}
    card = card_of(tmp_path / "out")
    assert "## Check\n\nThis folder was not compared with the trained policy" in card
    assert "How to load it" not in card


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "export: the following arguments are required: format"),
        (
            ["--format=zip"],
            "export: --format zip: there is no such format; give hf, adapter, merged, gguf-ready, preferences, or",
        ),
        (["--format=hf", "--into=x"], "export: unrecognized arguments: --into=x"),
        (["--format=hf", "--format.x=3"], "export: .*HFModel.*: Option 'x' is not accepted"),
        (["--format=nowhere.Ollama"], "export: .*'nowhere.Ollama': No module named 'nowhere'"),
        (["--format=own_exporters.Olama"], "export: .*has no attribute 'Olama'"),
        (["--format=own_exporters.Other"], "export: .*does not correspond to a subclass of ExportFormat"),
        (["--format=own_exporters.Abstract"], "export: .*own_exporters.Abstract is abstract"),
        (["--format=own_exporters.Ollama"], "export: .*Ollama.*arguments are required: temperature"),
        (["--format=own_exporters.Ollama", "--format.temperature=-1"], "export: temperature=-1.0 must be at"),
        (["--format=own_exporters.Ollama", "--format.temperature=x"], 'export: .*"temperature".*float.*x'),
    ],
)
def test_arguments_that_are_wrong(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command(["export", "run", *args])
    assert exit.value.code == 2
    assert re.search(f"^sppo-lightning: error: {message}.*\n$", capsys.readouterr().err)


def test_end_tokens_are_named_also_where_only_the_tokenizer_knows_them() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(eos_token_id=None))
    model.generation_config = GenerationConfig(
        temperature=0.6
    )  # not to be saved without do_sample, once changed
    name_end_tokens(model, byte_tokenizer())
    assert model.generation_config.eos_token_id == 1
    assert model.generation_config.do_sample
