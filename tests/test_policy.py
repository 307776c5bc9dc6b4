"""Loading a policy, copying it for sampling, and reading log-probs from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import byte_tokenizer, tiny_config
from test_generation import greedy, sampled
from tiny import CONFIGS, VOCABULARY, Source, random_tokens, tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, Qwen2Config

from sppo_lightning.batching import PairBatch, StepSlot, collate
from sppo_lightning.generation import SampleRequest
from sppo_lightning.losses import DPOLoss, PairLogps
from sppo_lightning.module import PreferenceModule
from sppo_lightning.policy import (
    LoRAConfig,
    PolicyConfig,
    check_updates_survive,
    disable_dropout,
    fingerprint,
    load_base_model,
    load_policy,
    pair_logps,
    sampling_copy,
)
from sppo_lightning.types import PreferencePair, UserError

PAD = 2
LORA = LoRAConfig(rank=4, alpha=8)
LENGTHS = [(5, 3, 1), (1, 6, 2), (9, 1, 4), (2, 2, 9), (7, 5, 5)]  # prompt, chosen, rejected


def pairs_of(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[PreferencePair]:
    pairs = []
    for number, length in enumerate(lengths):
        prompt, chosen, rejected = random_tokens(*length, seed=number)
        pairs.append(PreferencePair(f"p{number}", prompt, chosen, rejected, "c", "r", 1.0, 0.0))
    return pairs


def batch_of(pairs: Sequence[PreferencePair], *, pad: int = PAD) -> PairBatch:
    slot = StepSlot(step=0, steps=1, step_pairs=len(pairs), last_in_step=True)
    return collate(pairs, real=len(pairs), slot=slot, pad_token_id=pad)


def one_by_one(model: nn.Module, pairs: Sequence[PreferencePair]) -> PairLogps:
    """Each sequence alone, without padding, positions or mask; all logits, ``log_softmax``, float64."""

    def logp(prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        return logps[torch.arange(len(response)), torch.tensor(response)].sum()

    chosen = [logp(pair.prompt_token_ids, pair.chosen_token_ids) for pair in pairs]
    rejected = [logp(pair.prompt_token_ids, pair.rejected_token_ids) for pair in pairs]
    return PairLogps(torch.stack(chosen), torch.stack(rejected))


def close(found: PairLogps, expected: PairLogps, *, atol: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


def trainable(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)  # type: ignore[no-any-return]


def gradients(model: nn.Module, batches: Sequence[PairBatch]) -> dict[str, Tensor]:
    """Gradients of the sum over pairs of 2 chosen - rejected log-probs."""
    model.zero_grad()
    for batch in batches:
        logps = pair_logps(model, batch)
        (2 * logps.chosen - logps.rejected).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of each parameter's largest gradient."""
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


# ------------------------------------------------------------------ log-probs


@pytest.mark.parametrize(
    ("kind", "dtype", "atol"),
    [(kind, torch.float32, 1e-5) for kind in CONFIGS]
    # Gemma 2's attention masks with float64's lowest number and takes the softmax in float32: NaN
    + [(kind, torch.float64, 1e-10) for kind in CONFIGS if kind != "gemma2"],
)
@torch.no_grad()
def test_logps_equal_each_sequence_on_its_own(kind: str, dtype: torch.dtype, atol: float) -> None:
    """The tolerance is per token; the longest response has 9."""
    model = trainable(kind, torch.float64)
    expected = one_by_one(model, pairs_of())
    found = pair_logps(model.to(dtype), batch_of(pairs_of()))
    assert found.chosen.dtype == found.rejected.dtype == torch.float64
    close(found, expected, atol=9 * atol)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_padding_batch_size_and_order_change_nothing(kind: str) -> None:
    model, pairs = trainable(kind), pairs_of()
    whole = batch_of(pairs)
    expected, expected_gradients = pair_logps(model, whole), gradients(model, [whole])

    padding = pairs_of([(60, 20, 1)])  # twenty columns of responses, eighty in all
    order = [3, 0, 4, 2, 1]
    variants: list[tuple[list[PairBatch], Callable[[Tensor], Tensor]]] = [
        ([batch_of(pairs, pad=77)], lambda logps: logps),
        ([batch_of([pair]) for pair in pairs], lambda logps: logps),
        ([batch_of(pairs[:2]), batch_of(pairs[2:])], lambda logps: logps),
        ([batch_of([pairs[row] for row in order])], lambda logps: logps[torch.tensor(order).argsort()]),
        ([batch_of([*pairs, *padding])], lambda logps: logps[:-1]),
    ]
    for number, (batches, back) in enumerate(variants):
        parts = [pair_logps(model, batch) for batch in batches]
        found = PairLogps(*(back(torch.cat(side)) for side in zip(*parts, strict=True)))
        close(found, expected, atol=1e-5)
        if number < len(variants) - 1:
            close_gradients(gradients(model, batches), expected_gradients)


def test_gradients_equal_those_of_each_sequence_on_its_own() -> None:
    model = trainable(dtype=torch.float64)
    found = gradients(model, [batch_of(pairs_of())])
    model.zero_grad()
    logps = one_by_one(model, pairs_of())
    (2 * logps.chosen - logps.rejected).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient_and_no_sample(
    tiny_policy: Path, lora: LoRAConfig | None
) -> None:
    found, samples = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = PolicyConfig(str(tiny_policy), lora=lora, gradient_checkpointing=checkpointing)
        model = load_policy(config, compute_dtype=torch.float32).train()
        found.append(gradients(model, [batch_of(pairs_of())]))
        samples.append(
            sampled(Source(model), [SampleRequest(prompt, (1, 2)) for prompt in random_tokens(3, 9)])
        )
    close_gradients(found[1], found[0])
    assert samples[1] == samples[0]


def test_gradient_checkpointing_recomputes(tiny_policy: Path) -> None:
    """Each of the two layers runs twice, and so does its attention."""
    config = PolicyConfig(str(tiny_policy), gradient_checkpointing=True)
    model: Any = load_policy(config, compute_dtype=torch.float32).train()
    runs: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    gradients(model, [batch_of(pairs_of())])
    assert len(runs) == 4


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


@pytest.mark.parametrize("task", ["log-probs", "gradients", "generation"])
def test_a_frozen_head_is_never_held_once_a_sequence(tiny_policy: Path, task: str) -> None:
    """Without the hook on the head it is, which shows that this would be seen."""
    config = PolicyConfig(str(tiny_policy), lora=LORA)
    model: Any = load_policy(config, compute_dtype=torch.float32)
    batch = batch_of(pairs_of())
    prompts = random_tokens(*[6] * len(batch.input_ids))
    tasks: dict[str, Callable[[], object]] = {
        "log-probs": torch.no_grad()(lambda: pair_logps(model, batch)),
        "gradients": lambda: gradients(model, [batch]),
        "generation": lambda: greedy(Source(model), prompts, max_new_tokens=2),
    }
    head = model.get_base_model().lm_head
    assert not head.weight.requires_grad
    one_head_a_sequence = len(batch.input_ids) * head.weight.numel()
    assert largest_operand(tasks[task]) < one_head_a_sequence
    head._forward_pre_hooks.clear()
    assert largest_operand(tasks[task]) >= one_head_a_sequence


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
    gradients(model, [batch_of(pairs_of())])
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
    model = trainable()
    digests = {fingerprint(model, "base")}
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))  # the smallest change there is
        digests.add(fingerprint(model, "base"))
    assert len(digests) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_equal_for_equal_weights(dtype: torch.dtype) -> None:
    first, second = trainable(dtype=dtype), trainable(dtype=dtype)
    assert fingerprint(first, "base") == fingerprint(second, "base")
    assert fingerprint(first, "base") != fingerprint(second, "other")
    gradients(first, [batch_of(pairs_of())])
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
    gradients(model, [batch_of(pairs_of())])
    before = fingerprint(model, "base")
    optimizer.step()
    assert fingerprint(model, "base") != before
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_switches_off(tiny_policy: Path) -> None:
    """Once trained it does change the outputs; switched off, it never does."""
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=LORA), compute_dtype=torch.float32)
    base = load_base_model(PolicyConfig(str(tiny_policy)), compute_dtype=torch.float32)
    batch = batch_of(pairs_of())
    expected = pair_logps(base, batch)
    close(pair_logps(model, batch), expected, atol=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.1)
    assert float((pair_logps(model, batch).chosen - expected.chosen).abs().max()) > 0.1
    with model.disable_adapter():
        close(pair_logps(model, batch), expected, atol=0)


def test_target_modules_that_match_nothing(tiny_policy: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8, target_modules=["query", "value"])
    with pytest.raises(UserError, match=r"^model\.policy\.lora\.target_modules: .*query.*not found"):
        load_policy(PolicyConfig(str(tiny_policy), lora=lora), compute_dtype=torch.float32)


def test_target_modules_by_name(tiny_policy: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"])
    model = load_policy(PolicyConfig(str(tiny_policy), lora=lora), compute_dtype=torch.float32)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all("q_proj" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "nf4"},
            r"model\.policy\.quantization=nf4 freezes the weights, so that there is nothing to train: set "
            r"model\.policy\.lora too, or quantization: none",
        ),
        ({"lora": LoRAConfig(rank=0, alpha=8)}, r"model\.policy\.lora\.rank=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        PolicyConfig("policy", **settings)


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


def largest_ratio(found: PairLogps, reference: PairLogps, batch: PairBatch) -> float:
    """Largest |log-ratio| per token."""
    lengths = PairLogps(*batch.target_mask.sum(-1).chunk(2))
    ratios = [((a - b).abs() / n).max() for a, b, n in zip(found, reference, lengths, strict=True)]
    return max(float(ratio) for ratio in ratios)


def test_nf4_trains_an_adapter(policy_of_64: Path) -> None:
    model = load_quantized(policy_of_64, "nf4")
    layers = [module for module in model.modules() if type(module) is Linear4bit]
    assert len(layers) == 14
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    batch = batch_of(pairs_of())
    policy = pair_logps(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference = pair_logps(model, batch)
    assert largest_ratio(policy, reference, batch) <= NF4_TOLERANCE
    found = gradients(model, [batch])
    assert all(float(found[name].abs().max()) > 0 for name in found if "lora_B" in name)


def test_nf4_in_eval_mode_is_the_training_forward(policy_of_64: Path) -> None:
    model, batch = load_quantized(policy_of_64, "nf4"), batch_of(pairs_of())
    with torch.no_grad():
        trained = pair_logps(model, batch)
        evaluated = pair_logps(model.eval(), batch)
    assert largest_ratio(evaluated, trained, batch) <= NF4_TOLERANCE


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sampling_from_quantised_weights_leaves_the_gradients_alone(policy_of_64: Path, kind: str) -> None:
    """bitsandbytes packs 4-bit weights for AVX512-BF16 in an eval forward; that product has no backward."""
    model, batch = load_quantized(policy_of_64, kind), batch_of(pairs_of())
    before = gradients(model, [batch])
    greedy(Source(model), random_tokens(3, 9))
    after = gradients(model.train(), [batch])
    close_gradients(after, before)


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


GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
DROPPING = Qwen2Config(**{**CONFIGS["qwen2"].to_dict(), "attention_dropout": 0.5})


@pytest.mark.parametrize(
    "config", [GPT2, DROPPING, tiny_config(attention_dropout=0.5)], ids=lambda c: c.model_type
)
@torch.no_grad()
def test_disable_dropout_makes_training_and_evaluation_agree(config: Any) -> None:
    """GPT-2 drops embeddings, attention and residuals; the others attention, by a number and not a module."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    batch = batch_of(pairs_of())
    evaluated = pair_logps(model.eval(), batch)
    assert float((pair_logps(model.train(), batch).chosen - evaluated.chosen).abs().max()) > 1e-3
    disable_dropout(model)
    close(pair_logps(model, batch), evaluated, atol=0)


@torch.no_grad()
def test_disable_dropout_leaves_the_adapters_own(tiny_policy: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.5)
    model: Any = load_policy(PolicyConfig(str(tiny_policy), lora=lora), compute_dtype=torch.float32)
    disable_dropout(model)
    kept = {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")}
    assert kept == {0.5}


def test_a_modules_fingerprint_follows_its_weights_and_is_taken_once(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where weights change without an optimizer step, as when a checkpoint is loaded."""
    module = PreferenceModule(
        PolicyConfig(str(tiny_policy)), DPOLoss(0.1), 1e-3, reference="previous_iteration"
    )
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    taken: list[str] = []
    monkeypatch.setattr(
        "sppo_lightning.policy.fingerprint", lambda *given: taken.append(fingerprint(*given)) or taken[-1]
    )
    assert module.policy is not None
    digests = [module.fingerprint(), module.fingerprint()]
    with torch.no_grad():
        next(iter(module.policy.parameters())).view(-1)[0] += 1
    digests.append(module.fingerprint())
    module.policy.load_state_dict({name: value + 1 for name, value in module.policy.state_dict().items()})
    digests.append(module.fingerprint())
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(taken) == 3
    assert digests[-1] == fingerprint(module.policy, str(tiny_policy))
