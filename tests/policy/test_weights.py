"""A model whose files lack something is refused, by what it lacks; nothing is initialised at random in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import byte_tokenizer, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_base_model
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.rewards import SequenceClassificationReward
from sppo_lightning.types import UserError

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def load_policy(folder: Path) -> Any:
    return load_base_model(PolicyConfig(str(folder)), compute_dtype=torch.float32)


def load_reward(folder: Path) -> None:
    reward = SequenceClassificationReward(str(folder))
    reward.check()
    reward.load(CPU)


@pytest.fixture
def change(tmp_path: Path, tiny_policy: Path, tiny_reward_model: Path) -> Callable[..., Path]:
    """Copy a model's folder, its weights changed."""

    def copied(what: str, edit: Callable[[Weights], Weights]) -> Path:
        folder = tmp_path / what
        shutil.copytree(tiny_policy if what == "policy" else tiny_reward_model, folder)
        weights = load_file(folder / "model.safetensors")
        save_file(
            {k: v.contiguous() for k, v in edit(weights).items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder

    return copied


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


EDITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a layer": (
        without("layers.1."),
        r"lacks model\.layers\.1\.\S+, \S+, \S+ and \d+ more, which would be random",
    ),
    "a norm": (
        without("model.norm"),
        r"lacks model\.norm\.weight, which would be random: is this the whole folder",
    ),
    "DDP's prefix": (
        prefixed("module."),
        r"its files hold names that begin with 'module\.', of a wrapped model",
    ),
    "compile's prefix": (prefixed("_orig_mod."), r"names that begin with '_orig_mod\.', of a wrapped model"),
    "another shape": (
        lambda weights: {**weights, "model.norm.weight": torch.ones(7)},
        r"model\.norm\.weight|size mismatch|mismatched",
    ),
    "NaN": (
        lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"] * float("nan")},
        r"the weight model\.norm\.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("what", ["policy", "reward"])
@pytest.mark.parametrize("name", EDITS)
def test_weights_that_are_missing_or_broken_are_named(
    what: str, name: str, change: Callable[..., Path]
) -> None:
    edit, wording = EDITS[name]
    folder = change(what, edit)
    with pytest.raises(UserError, match=wording) as error:
        (load_policy if what == "policy" else load_reward)(folder)
    key = "model.policy.pretrained" if what == "policy" else "data.reward.init_args.pretrained"
    assert str(error.value).startswith(f"{key}='{folder}'")
    assert "\n" not in str(error.value)


def test_a_reward_model_without_its_head(change: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"lacks score\.weight, which would be random"):
        load_reward(change("reward", without("score")))


def test_a_value_head_in_its_place(change: Callable[..., Path]) -> None:
    def edit(weights: Weights) -> Weights:
        return {**without("score")(weights), "v_head.summary.weight": torch.ones(1, 32)}

    with pytest.raises(UserError, match=r"lacks score\.weight, .* begin with 'v_head\.'"):
        load_reward(change("reward", edit))


def test_a_language_model_that_names_no_class_as_reward_model(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("architectures")
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 1, "id2label": {"0": "a"}}))
    with pytest.raises(UserError, match=r"lacks score\.weight, which would be random"):
        load_reward(folder)


def test_what_is_left_over_is_a_warning(change: Callable[..., Path]) -> None:
    folder = change("policy", lambda weights: {**weights, "extra.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"holds extra\.weight, which this model has no place for"):
        load_policy(folder)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_policy(folder)


def sharded(folder: Path) -> Path:
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_an_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "reward")
    load_reward(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../other/model.safetensors", "/etc/passwd", 3):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "score.weight": name}}))
        with pytest.raises(UserError, match=r"index\.json names .*, which lies outside of the folder"):
            load_reward(folder)
    for text in ("{", "[]", '{"weight_map": []}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is no index of weights"):
            load_reward(folder)


@pytest.mark.parametrize(
    ("content", "wording"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            r"is a Git LFS pointer, not the file",
        ),
        (b"", r"weights cannot be read|no weights that can be read"),
        (
            b"\x10\x00\x00\x00\x00\x00\x00\x00not a header",
            r"weights cannot be read|no weights that can be read",
        ),
        (None, r"weights cannot be read|no weights that can be read"),  # half of the file
    ],
)
def test_a_file_that_is_not_whole(
    content: bytes | None, wording: str, tiny_policy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=wording) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has no weights that can be read .*put the model's safetensors files"
    ):
        load_policy(folder)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        (
            {},
            r"is stored quantised \(bitsandbytes\), and quantised weights cannot be trained: set model\.policy\.lora",
        ),
        (
            {"lora": LoRAConfig(rank=1, alpha=1.0), "quantization": "int8"},
            r"is stored quantised \(bitsandbytes\), so that model\.policy\.quantization=int8 would do nothing",
        ),
    ],
)
def test_weights_that_are_stored_quantised(
    settings: dict[str, Any], wording: str, tiny_policy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(UserError, match=wording):
        PolicySpec(PolicyConfig(str(folder), **settings)).check(compute_dtype=torch.float32, device=CPU)
