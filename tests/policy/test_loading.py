"""Loading a policy, copying it for sampling, and what training does to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support.models import byte_tokenizer, tiny_config
from support.sampling import greedy, sampled
from support.tiny import (
    CONFIGS,
    TRAINED_CONFIGS,
    Source,
    batch_of,
    close_gradients,
    gradients,
    new_model,
    pairs_of,
    random_tokens,
    tiny_model,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MllamaTextConfig, Qwen2Config

from sppo_lightning.generation import SampleRequest
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy.anatomy import freeze_non_text_modules, non_text_modules
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.folder import loader_name, write_folder
from sppo_lightning.policy.loading import disable_dropout, load_base_model, load_policy, sampling_copy
from sppo_lightning.policy.rounding import check_updates_survive
from sppo_lightning.types import PreferencePair, UserError

PAD = 2
LORA = LoRAConfig(rank=4, alpha=8)


FORWARDS = [PlainForward(), SharedForward()]
every_forward = pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: type(forward).__name__)


def read(forward: PairForward, model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """Log-prob of each response token, ``[N]``."""
    return forward.token_logps(model, batch_of(pairs, forward.layout(PAD)).rows)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a sum over response tokens."""
    return gradients(model, read(PlainForward(), model, pairs_of()))


def close(found: Tensor, expected: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_sample(tiny_policy: Path, lora: LoRAConfig | None) -> None:
    samples = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = PolicyConfig(str(tiny_policy), lora=lora, gradient_checkpointing=checkpointing)
        model = load_policy(config, compute_dtype=torch.float32).train()
        trained(model)
        samples.append(
            sampled(Source(model), [SampleRequest(prompt, (1, 2)) for prompt in random_tokens(3, 9)])
        )
    assert samples[1] == samples[0]


# ------------------------------------------------------------ the head's copy


def largest_operand(compute: Callable[[], object]) -> int:
    """Return the most elements of any tensor that goes into an operation or is allocated by one.

    A head that is multiplied sequence by sequence appears as an operand ``[B, H, V]``; that some kernels copy
    it costs B times the head's memory.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        compute()
    largest = 0
    for event in recorded.events():
        for shape in event.input_shapes or ():
            if shape and all(isinstance(size, int) for size in shape):
                largest = max(largest, torch.Size(shape).numel())
        largest = max(largest, event.self_cpu_memory_usage // 4)
    return largest


@every_forward
def test_training_never_holds_a_frozen_head_once_a_sequence(tiny_policy: Path, forward: PairForward) -> None:
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=torch.float32)
    head = model.get_base_model().lm_head.weight
    assert not head.requires_grad
    two_heads = 2 * head.numel()
    assert largest_operand(torch.no_grad()(lambda: read(forward, model, pairs_of()))) < two_heads
    assert largest_operand(lambda: gradients(model, read(forward, model, pairs_of()))) < two_heads


def test_generation_never_holds_a_frozen_head_once_a_sequence(tiny_policy: Path) -> None:
    """Without the hook on the head it does, which shows that this would be seen."""
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=torch.float32)
    head = model.get_base_model().lm_head
    one_head_a_sequence = 10 * head.weight.numel()

    def generate() -> object:
        return greedy(Source(model), random_tokens(*[6] * 10), max_new_tokens=2)

    assert largest_operand(generate) < one_head_a_sequence
    head._forward_pre_hooks.clear()
    assert largest_operand(generate) >= one_head_a_sequence


def test_the_sampling_copy_keeps_the_head_from_being_copied(tiny_policy: Path) -> None:
    model = load_base_model(PolicyConfig(str(tiny_policy)), compute_dtype=torch.float32)
    copied = sampling_copy(model, torch.bfloat16)
    size = largest_operand(lambda: greedy(Source(copied), random_tokens(*[6] * 10), max_new_tokens=2))
    assert size < 10 * model.get_output_embeddings().weight.numel()


# ---------------------------------------------------------------- sampling copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_sampling_copy_is_a_frozen_copy(dtype: torch.dtype, tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).train()
    trained(model)
    copied = sampling_copy(model, dtype)
    before = {name: value.clone() for name, value in copied.named_parameters()}
    assert not copied.training
    assert model.training
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, parameter in copied.named_parameters():
        original = model.get_parameter(name)
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, original.to(dtype))
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) == tied
    mine = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    theirs = {value.untyped_storage().data_ptr() for value in (*copied.parameters(), *copied.buffers())}
    assert not mine & theirs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(copied.get_parameter(name), value) for name, value in before.items())


def test_sampling_copy_samples_as_the_policy_does(tiny_policy: Path) -> None:
    model = load_base_model(PolicyConfig(str(tiny_policy)), compute_dtype=torch.float32)
    prompts = random_tokens(3, 20)
    assert greedy(Source(sampling_copy(model, torch.float32)), prompts) == greedy(Source(model), prompts)


def test_sampling_copy_keeps_buffers_as_they_are() -> None:
    """Rotary frequencies in bfloat16 would turn far positions by whole radians."""
    copied = sampling_copy(tiny_model(), torch.bfloat16)
    assert {buffer.dtype for buffer in copied.buffers()} == {torch.float32}


# ----------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_any_weight() -> None:
    model = new_model()
    digests = {fingerprint(model, "base")}
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))  # the smallest change there is
        digests.add(fingerprint(model, "base"))
    assert len(digests) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_equal_for_equal_weights(dtype: torch.dtype) -> None:
    first, second = new_model(dtype=dtype), new_model(dtype=dtype)
    assert fingerprint(first, "base") == fingerprint(second, "base")
    assert fingerprint(first, "base") != fingerprint(second, "other")
    trained(first)
    assert fingerprint(first.eval(), "base") == fingerprint(second.train(), "base")


def test_fingerprint_of_an_adapter_ignores_the_frozen_base(tiny_policy: Path) -> None:
    torch.manual_seed(0)
    model = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=torch.float32)
    before = fingerprint(model, "base")
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).add_(1.0)
    assert fingerprint(model, "base") == before
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    assert fingerprint(model, "base") != before


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("dtype", "lora", "compute", "expected"),
    [
        ("auto", None, torch.bfloat16, torch.float32),
        ("auto", LORA, torch.bfloat16, torch.bfloat16),
        ("float32", LORA, torch.bfloat16, torch.float32),
        ("bfloat16", None, torch.float32, torch.bfloat16),
    ],
)
def test_dtype_of_the_weights(
    tiny_policy: Path, dtype: Any, lora: LoRAConfig | None, compute: torch.dtype, expected: torch.dtype
) -> None:
    model = load_base_model(PolicyConfig(str(tiny_policy), dtype=dtype, lora=lora), compute_dtype=compute)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_lora_trains_a_float32_adapter_and_nothing_else(tiny_policy: Path, compute: torch.dtype) -> None:
    model = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=compute)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapter = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {p.dtype for p in base.values()} == {compute}
    assert {p.dtype for _, p in adapter} == {torch.float32}
    assert all("lora_" in name for name, _ in adapter)
    assert len(adapter) == 2 * 7 * 2  # two matrices for each of seven layers of two blocks
    optimizer = torch.optim.SGD([p for _, p in adapter], lr=1e-3)
    read(PlainForward(), model, pairs_of()).sum().backward()
    before = fingerprint(model, "base")
    optimizer.step()
    assert fingerprint(model, "base") != before
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())


@every_forward
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_switches_off(tiny_policy: Path, forward: PairForward) -> None:
    """Once trained it does change the outputs; switched off, it never does."""
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=torch.float32)
    base = load_base_model(PolicyConfig(str(tiny_policy)), compute_dtype=torch.float32)
    expected = read(forward, base, pairs_of())
    close(read(forward, model, pairs_of()), expected, atol=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.1)
    assert float((read(forward, model, pairs_of()) - expected).abs().max()) > 0.1
    with model.disable_adapter():
        close(read(forward, model, pairs_of()), expected, atol=0)


# ------------------------------------------------------------------ quantisation

NF4_TOLERANCE = 1e-5  # nats per token, on the CPU, as in float32: the same product in train and eval mode


@pytest.fixture(scope="module")
def policy_of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of quantisation are 64 weights long."""
    folder = tmp_path_factory.mktemp("policy-64")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_quantized(folder: Path, kind: Any, *, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    lora = LoRAConfig(rank=4, alpha=8, dropout=dropout)
    config = PolicyConfig(str(folder), quantization=kind, lora=lora)
    model = load_policy(config, compute_dtype=torch.float32)
    disable_dropout(model)
    return model.train()


@every_forward
def test_nf4_trains_an_adapter(policy_of_64: Path, forward: PairForward) -> None:
    model = load_quantized(policy_of_64, "nf4")
    layers = [module for module in model.modules() if type(module) is Linear4bit]
    assert len(layers) == 14
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    policy = read(forward, model, pairs_of())
    with torch.no_grad(), model.disable_adapter():
        reference = read(forward, model, pairs_of())
    close(policy, reference, atol=NF4_TOLERANCE)
    found = gradients(model, policy)
    assert all(float(found[name].abs().max()) > 0 for name in found if "lora_B" in name)


@every_forward
@torch.no_grad()
def test_nf4_in_eval_mode_is_the_training_forward(policy_of_64: Path, forward: PairForward) -> None:
    model = load_quantized(policy_of_64, "nf4")
    in_training = read(forward, model, pairs_of())
    close(read(forward, model.eval(), pairs_of()), in_training, atol=NF4_TOLERANCE)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sampling_from_quantised_weights_leaves_the_gradients_alone(policy_of_64: Path, kind: str) -> None:
    """bitsandbytes packs 4-bit weights for AVX512-BF16 in an eval forward; that product has no backward."""
    model = load_quantized(policy_of_64, kind)
    before = trained(model)
    greedy(Source(model), random_tokens(3, 9))
    close_gradients(trained(model.train()), before)


# ----------------------------------------------------------- guards of training


def test_a_rate_that_bfloat16_swallows() -> None:
    """Weights of 0.02 are 2^-6 x 1.28, spaced by 1.2e-4: a step of 5e-7 rounds to nothing, one of 1e-3 does not."""
    weights = [nn.Parameter(torch.full((4, 4), 0.02, dtype=torch.bfloat16))]
    message = (
        r"^model\.learning_rate=5e-07 is lost to rounding in 100% of the trainable weights: hold them in float32 "
        r"\(model\.policy\.dtype: auto, trainer\.precision: bf16-mixed\) or use lora$"
    )
    with pytest.raises(UserError, match=message):
        check_updates_survive(weights, 5e-7)
    check_updates_survive(weights, 1e-3)
    check_updates_survive([nn.Parameter(weights[0].detach().float())], 5e-7)
    check_updates_survive([], 5e-7)


def test_the_guard_agrees_with_the_arithmetic() -> None:
    """Refused where adding the rate does leave most weights as they are, and only there."""
    weights = 0.02 * torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rate in (1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
        lost = float((weights - rate == weights).float().mean())
        if lost < 0.3:
            check_updates_survive([nn.Parameter(weights)], rate)
        elif lost > 0.7:
            with pytest.raises(UserError, match="is lost to rounding"):
                check_updates_survive([nn.Parameter(weights)], rate)


DROPPING = Qwen2Config(**{**CONFIGS["qwen2"].to_dict(), "attention_dropout": 0.5})


@pytest.mark.parametrize(
    "config",
    [TRAINED_CONFIGS["gpt2"], DROPPING, tiny_config(attention_dropout=0.5)],
    ids=lambda c: c.model_type,
)
@torch.no_grad()
def test_disable_dropout_makes_training_and_evaluation_agree(config: Any) -> None:
    """GPT-2 drops embeddings, attention and residuals; the others attention, by a number and not a module."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    evaluated = read(PlainForward(), model.eval(), pairs_of())
    assert float((read(PlainForward(), model.train(), pairs_of()) - evaluated).abs().max()) > 1e-3
    disable_dropout(model)
    close(read(PlainForward(), model, pairs_of()), evaluated, atol=0)


@torch.no_grad()
def test_disable_dropout_leaves_the_adapters_own(tiny_policy: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.5)
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=lora), compute_dtype=torch.float32)
    disable_dropout(model)
    kept = {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")}
    assert kept == {0.5}


# -------------------------------------------------------------------- multimodal

MULTIMODAL = ("gemma3_seeing", "gemma4_seeing", "mistral3_seeing")
NON_TEXT = ("vision_tower", "multi_modal_projector", "embed_vision")  # what text never passes through


def multimodal_policy(kind: str, folder: Path, lora: LoRAConfig | None = None) -> nn.Module:
    new_model(kind).save_pretrained(folder)
    return load_policy(PolicyConfig(str(folder), lora=lora), compute_dtype=torch.float32)


@pytest.mark.parametrize("kind", MULTIMODAL)
@pytest.mark.parametrize(
    "lora",
    [None, LoRAConfig(rank=2, alpha=4), LoRAConfig(rank=2, alpha=4, target_modules=["q_proj"])],
    ids=["full", "all-linear", "q_proj"],
)
def test_all_that_is_trained_of_a_multimodal_model_gets_a_gradient(
    kind: str, lora: LoRAConfig | None, tmp_path: Path
) -> None:
    """DDP waits for the gradient of each; a vision tower has layers of the same names."""
    model = multimodal_policy(kind, tmp_path, lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {
        name for name, _ in model.named_parameters() if any(f".{part}." in f".{name}" for part in NON_TEXT)
    }
    assert others
    assert trained
    assert not trained & others
    forward = AutoForward()
    forward.prepare(model, ParityCheck(40, nullcontext, bool))
    logps = forward.token_logps(model, batch_of(pairs_of(), forward.layout(PAD)).rows)
    logps.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    if lora is None:
        assert trained | others == {name for name, _ in model.named_parameters()}


def test_an_adapter_that_names_only_the_vision_tower_matches_nothing(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, alpha=4, target_modules=["patch_conv"])
    with pytest.raises(UserError, match=r"^model\.policy\.lora\.target_modules: No modules were targeted"):
        multimodal_policy("mistral3_seeing", tmp_path, lora)


def test_a_model_for_text_has_no_non_text_modules() -> None:
    for kind in ("llama", "gemma3", "qwen3_5", "gpt2", "opt", "bart"):
        assert non_text_modules(new_model(kind)) == []


def test_non_text_weights_outside_of_modules_are_frozen_too() -> None:
    """LLaVA-NeXT's mark of a new line is one."""
    model = new_model("gemma3_seeing")
    model.model.image_newline = nn.Parameter(torch.zeros(32))
    freeze_non_text_modules(model)
    assert not model.model.image_newline.requires_grad
    assert model.lm_head.weight.requires_grad
    plain = new_model()
    freeze_non_text_modules(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_a_part_of_a_model_with_settings_of_its_own_is_loaded_by_the_usual_class() -> None:
    """Llama 3.2 Vision's, which no mapping of transformers knows."""
    model = new_model()
    assert loader_name(model) == "AutoModelForCausalLM"
    model.config = MllamaTextConfig()
    assert loader_name(model) == "AutoModelForCausalLM"
    assert loader_name(new_model("mistral3_seeing")) == "AutoModelForImageTextToText"


def test_a_policy_is_written_though_its_base_is_gone(tmp_path: Path) -> None:
    """Without what prepares images, which was there."""
    model = multimodal_policy("gemma3_seeing", tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    write_folder(model, byte_tokenizer(), tmp_path / "policy")
    assert (tmp_path / "policy/model.safetensors").exists()
