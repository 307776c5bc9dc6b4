"""Opening pretrained models: folders, GGUF files, and what ends a response."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from support.models import SPECIAL, byte_tokenizer, tiny_config
from support.sampling import greedy
from support.tiny import OTHER_CONFIGS, TRAINED_CONFIGS, Source, alone, pairs_of, random_tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Florence2Config,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.loading import end_token_ids, load_policy
from sppo_lightning.policy.pretrained import (
    class_of,
    file_beside,
    hub_location,
    load_model_config,
    load_tokenizer,
    model_class,
    stored_dtype,
)
from sppo_lightning.prompts.chat_template import turn_end
from sppo_lightning.types import Message, UserError

KEY = "model.policy.pretrained"


def config_of(pretrained: object, expect: Literal["causal-lm", "reward"] = "causal-lm") -> Any:
    return load_model_config(str(pretrained), key=KEY, trust_remote_code=False, expect=expect)


# ------------------------------------------------------------------------ GGUF

TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TENSORS:
        return f"{TENSORS[stem]}.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{BLOCK_TENSORS[rest]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head, as llama.cpp orders them: [0, n/2, 1, n/2 + 1, ...]."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))))
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_token_types([control] * len(SPECIAL) + [normal] * 256)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(str(tokenizer.chat_template))
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def gguf_file(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, original)
    return path


def test_a_gguf_file_loads_to_the_same_weights(original: LlamaForCausalLM, gguf_file: Path) -> None:
    assert config_of(gguf_file).num_hidden_layers == 2
    model: Any = load_policy(PolicyConfig(str(gguf_file)), compute_dtype=torch.bfloat16)
    expected = dict(original.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_policy_from_gguf_can_be_saved_and_sampled_from(
    original: LlamaForCausalLM, gguf_file: Path, tmp_path: Path
) -> None:
    model: Any = load_policy(PolicyConfig(str(gguf_file)), compute_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(alone(again, pairs_of()), alone(original, pairs_of()))
    prompts = random_tokens(3, 20)
    assert greedy(Source(model), prompts) == greedy(Source(original), prompts)


def test_a_gguf_file_brings_its_tokenizer(gguf_file: Path) -> None:
    tokenizer: Any = load_tokenizer(str(gguf_file), key=KEY, trust_remote_code=False)
    expected: Any = byte_tokenizer()
    text = "A hé, 你\n<eos> b"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [Message(role="user", content="hi")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<bos><user>hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_hub_location() -> None:
    assert hub_location("models/tiny.gguf") == ("models", {"gguf_file": "tiny.gguf"})
    assert hub_location("owner/name") == ("owner/name", {})
    assert hub_location("models/folder") == ("models/folder", {})


# ------------------------------------------------------------------ end tokens


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ([3, 4], 5, {1, 3, 4, 5}),
        (3, [5, 6], {1, 3, 5, 6}),
        (None, [5, 6], {1, 5, 6}),
        (0, 0, {0, 1}),  # configs that are wrong, and a tokenizer that knows
        (None, None, {1}),
    ],
)
def test_end_tokens_are_all_that_any_file_names(generation: Any, model: Any, expected: set[int]) -> None:
    config = tiny_config(eos_token_id=model)
    assert end_token_ids(config, byte_tokenizer(), GenerationConfig(eos_token_id=generation)) == expected


def test_end_tokens_without_a_generation_config() -> None:
    assert end_token_ids(tiny_config(eos_token_id=7), byte_tokenizer(), None) == {1, 7}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<pad>", 2),  # a turn's end that no file names
        ("<pad>\n", 2),
        ("<pad>\n<bos>", 2),
        ("\n<pad>", 2),
        ("", None),
        ("</s>", None),  # a text, no special token
        ("<pad>Next", None),
    ],
)
def test_the_template_knows_how_a_turn_ends(end: str, expected: int | None) -> None:
    template = (
        "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}"
        + end
        + "{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    assert turn_end(tokenizer) == expected
    found = end_token_ids(tiny_config(eos_token_id=None), tokenizer, None)
    assert found == ({1} if expected is None else {1, expected})
    assert turn_end(byte_tokenizer(chat_template=None)) is None
    assert turn_end(byte_tokenizer(chat_template="{{ raise_exception('no') }}")) is None


def test_no_end_token_at_all() -> None:
    tokenizer: Any = SimpleNamespace(eos_token_id=None, chat_template=None)
    with pytest.raises(
        UserError, match=r"^the policy names no end-of-sequence token: set eos_token_id in its gen"
    ):
        end_token_ids(tiny_config(eos_token_id=None), tokenizer, None)


def test_end_tokens_of_a_saved_model(tmp_path: Path) -> None:
    """As instruct models do it: the config knows one, the generation config a list."""
    model = LlamaForCausalLM(tiny_config())
    model.generation_config.eos_token_id = [1, 100]
    model.save_pretrained(tmp_path)
    loaded: Any = load_policy(PolicyConfig(str(tmp_path)), compute_dtype=torch.float32)
    assert end_token_ids(loaded.config, byte_tokenizer(), loaded.generation_config) == {1, 100}


# ----------------------------------------------------- tokenizers and wrong places


def test_a_missing_pad_token_becomes_the_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    LlamaForCausalLM(tiny_config()).config.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), key=KEY, trust_remote_code=False).pad_token_id == 1


def test_models_of_the_right_kind(tiny_policy: Path, tiny_reward_model: Path) -> None:
    assert config_of(tiny_policy).model_type == "llama"
    assert config_of(tiny_reward_model, "reward").num_labels == 1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent", r"{key}='.*absent': no such model; give a model folder, a hub id or a \.gguf file"),
        ("absent.gguf", r"{key}='.*absent\.gguf': no such model"),
        ("empty", r"{key}='.*empty': the folder has no config\.json, so it holds no model"),
        ("notes.txt", r"{key}='.*notes\.txt' is a file but not \.gguf: give the model's folder"),
        ("broken", r"{key}='.*broken' cannot be read as a model \("),
        ("broken.gguf", r"{key}='.*broken\.gguf' cannot be read as a model \("),
    ],
)
def test_places_that_hold_no_model(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    for file in ("notes.txt", "broken.gguf"):
        (tmp_path / file).write_text("no model")
    with pytest.raises(UserError, match="^" + message.replace("{key}", r"model\.policy\.pretrained")):
        config_of(tmp_path / place)


def test_models_of_the_wrong_kind(tiny_policy: Path, tiny_reward_model: Path) -> None:
    with pytest.raises(UserError, match=r"is a LlamaForCausalLM, not a sequence-classification model$"):
        config_of(tiny_policy, "reward")
    with pytest.raises(
        UserError, match=r"is a LlamaForSequenceClassification, not a language model that can answer$"
    ):
        config_of(tiny_reward_model)


def test_a_model_that_reads_to_translate_cannot_answer(tmp_path: Path) -> None:
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "named")
    T5Config().save_pretrained(tmp_path / "nameless")
    for place, kind in (("named", "T5ForConditionalGeneration"), ("nameless", "'t5' model")):
        with pytest.raises(UserError, match=f" is a {kind}, not a language model that can answer$"):
            config_of(tmp_path / place)


def test_a_model_that_sees_is_loaded_by_the_class_for_text_where_there_is_one(tmp_path: Path) -> None:
    for kind, expected in (
        ("llama", AutoModelForCausalLM),
        ("gemma3_seeing", AutoModelForCausalLM),
        ("mistral3_seeing", AutoModelForImageTextToText),
    ):
        config = {**TRAINED_CONFIGS, **OTHER_CONFIGS}[kind]
        assert class_of(config) is expected
        config.save_pretrained(tmp_path / kind)
        options: dict[str, Any] = {"key": "model.policy.pretrained", "trust_remote_code": False}
        assert model_class(str(tmp_path / kind), **options) is expected


def test_a_model_that_sees_and_translates_cannot_answer() -> None:
    assert class_of(Florence2Config()) is None


def test_the_dtype_of_stored_weights_may_stand_in_the_settings_of_the_text() -> None:
    config = copy.deepcopy(OTHER_CONFIGS["gemma3_seeing"])
    config.dtype, config.text_config.dtype = None, torch.bfloat16
    assert stored_dtype(config) == torch.bfloat16
    config.dtype = torch.float16
    assert stored_dtype(config) == torch.float16
    assert stored_dtype(LlamaConfig()) is None


def test_a_file_beside_a_model_is_found_or_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("x")
    assert file_beside(str(tmp_path), "tokenizer.model") == str(tmp_path / "tokenizer.model")
    assert file_beside(str(tmp_path), "other.json") is None
    assert file_beside(str(tmp_path / "gone"), "tokenizer.model", fetch=False) is None
    assert file_beside("nobody/nothing", "tokenizer.model", fetch=False) is None
    assert file_beside(str(tmp_path / "model.gguf"), "tokenizer.model") is None


def test_a_models_own_code_is_trusted_to_answer() -> None:
    config = T5Config()
    assert class_of(config) is None
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    assert class_of(config) is AutoModelForCausalLM
