"""Passes on tensors without data take what the same passes take on real ones."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import bitsandbytes
import pytest
import torch
from support.memory import peak_of, step
from support.models import tiny_config
from support.tiny import TRAINED_CONFIGS, kinds, new_model
from torch import nn
from transformers import AutoModelForCausalLM

from sppo_lightning.generation.cache import reserved_cache
from sppo_lightning.memory.dry_run import DryRun, cpu_forwards, optimizer_memory
from sppo_lightning.memory.workload import PairShape
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward, VarlenForward
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.footprint import footprint
from sppo_lightning.policy.lora import with_adapter
from sppo_lightning.system.device_memory import PeakMemory

CONFIG = tiny_config(
    vocab_size=1000, hidden_size=64, intermediate_size=176, num_hidden_layers=3, tie_word_embeddings=False
)
SHAPE = PairShape(pairs=3, prompt=40, response=24)
LORA = LoRAConfig(rank=4, alpha=4, dropout=0.1)


def policy(lora: LoRAConfig | None = None, checkpointing: bool = False) -> PolicyConfig:
    return PolicyConfig("x", lora=lora, gradient_checkpointing=checkpointing)


def dry(config: PolicyConfig, dtype: torch.dtype, model_config: Any = CONFIG) -> DryRun:
    model = policies.meta_model(config, model_config, compute_dtype=dtype)
    policies.disable_dropout(model)
    return DryRun(model, compute_dtype=dtype)


def real(config: PolicyConfig, dtype: torch.dtype, model_config: Any = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    held = torch.float32 if config.lora is None else dtype
    model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=held)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is not None:
        model = with_adapter(model, config.lora, pretrained="x")
    policies.disable_dropout(model)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_training_step_takes_what_the_real_one_takes(
    dtype: torch.dtype, lora: LoRAConfig | None, checkpointing: bool
) -> None:
    config = policy(lora, checkpointing)
    forward = SharedForward(chunk=50)  # three chunks, two of which are recomputed
    found = dry(config, dtype).training(forward, SHAPE, accumulates=False)
    model = real(config, dtype)
    assert found == pytest.approx(peak_of(model, lambda: step(model, forward, SHAPE, dtype)), rel=0.01)


@pytest.mark.parametrize("kind", kinds("llama", "gemma3", "gpt_oss", "lfm2", "qwen3_moe"))
def test_other_architectures_do_too(kind: str) -> None:
    """Rows with padding may take less in truth: transformers makes no mask where it can look at the tokens."""
    config = TRAINED_CONFIGS[kind]
    shape = PairShape(pairs=2, prompt=20, response=12)
    try:
        found = dry(policy(), torch.bfloat16, config).training(PlainForward(), shape, accumulates=False)
    except RuntimeError:
        # products of experts in float32; transformers 5.17 looks at OPT's tokens
        assert kind in ("gpt_oss", "qwen3_moe", "opt")
        return
    model = new_model(kind).train()
    policies.disable_dropout(model)
    model.config.use_cache = False
    truth = peak_of(model, lambda: step(model, PlainForward(), shape, torch.bfloat16))
    assert 0.99 * truth <= found <= 1.15 * truth


def estimate_and_growth() -> tuple[int, int]:
    """Bytes that a training step takes: as estimated, and as the process grows; one step is before, to load kernels."""
    config = tiny_config(
        vocab_size=16000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, initializer_range=0.02
    )
    shape, forward = PairShape(pairs=4, prompt=256, response=128), SharedForward()
    found = dry(policy(), torch.bfloat16, config).training(forward, shape, accumulates=False)
    model = real(policy(), torch.bfloat16, config)
    step(model, forward, PairShape(1, 8, 8), torch.bfloat16)
    model.zero_grad()
    meter = PeakMemory(torch.device("cpu"))
    meter.taken()
    before = meter.taken()
    step(model, forward, shape, torch.bfloat16)
    after = meter.taken()
    assert before is not None
    assert after is not None
    return found, after.held - before.held


@pytest.mark.slow
def test_a_training_step_takes_that_much_of_the_process() -> None:
    """Resident memory, which counts what no tensor is; of a new process, which has freed nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        found, growth = processes.submit(estimate_and_growth).result()
    assert growth == pytest.approx(found, rel=0.15)


def test_gradients_that_are_there_already_come_on_top() -> None:
    run = dry(policy(), torch.bfloat16)
    alone, more = (run.training(SharedForward(), SHAPE, accumulates=after) for after in (False, True))
    assert 0 < more - alone <= footprint(run.model).trained


def test_a_model_is_as_it_was_after_a_run() -> None:
    run = dry(policy(LORA), torch.bfloat16)
    kernel = run.model.config._attn_implementation
    run.training(SharedForward(), SHAPE, accumulates=True)
    assert run.model.config._attn_implementation == kernel
    before = [run.training(SharedForward(), SHAPE, accumulates=True), run.scoring(SharedForward(), SHAPE)]
    assert before == [
        run.training(SharedForward(), SHAPE, accumulates=True),
        run.scoring(SharedForward(), SHAPE),
    ]
    assert run.model.config._attn_implementation == kernel
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_forward_pass_takes_what_the_real_one_takes() -> None:
    found = dry(policy(LORA), torch.bfloat16).scoring(SharedForward(), SHAPE)
    model = real(policy(LORA), torch.bfloat16)

    def forward_only() -> None:
        with torch.no_grad():
            rows = SharedForward().layout(0).rows(*([[5] * n] * SHAPE.pairs for n in (40, 24, 24)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                SharedForward().logps(model, rows)

    assert found == pytest.approx(peak_of(model, forward_only), rel=0.01)


def test_reading_a_prompt_takes_what_the_real_reading_takes() -> None:
    found = dry(PolicyConfig("x", dtype="bfloat16"), torch.bfloat16).reading(200)
    model = real(policy(), torch.bfloat16).to(torch.bfloat16).eval()

    def read() -> None:
        tokens = torch.ones(1, 200, dtype=torch.long)
        with torch.no_grad():
            model(
                input_ids=tokens,
                attention_mask=tokens,
                position_ids=torch.arange(200)[None],
                past_key_values=reserved_cache(CONFIG),
                use_cache=True,
                logits_to_keep=1,
            )

    assert found == pytest.approx(peak_of(model, read), rel=0.1)


def test_shared_weights_stay_shared() -> None:
    config = tiny_config(tie_word_embeddings=True)
    run = dry(policy(), torch.float32, config)
    model: Any = run.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = sum(parameter.numel() for parameter in new_model("llama").parameters())
    assert footprint(model).trained_count == untied - 259 * 32


class TestStandIns:
    def kinds(self, forward: PairForward) -> list[type[PairForward]]:
        return [type(one) for one in cpu_forwards(forward, device_type="cuda", vocabulary=1000)]

    def test_auto_tries_to_share_first(self) -> None:
        assert self.kinds(AutoForward()) == [SharedForward, PlainForward]

    def test_the_gpu_kernel_is_stood_in_for(self) -> None:
        assert self.kinds(VarlenForward()) == [SharedForward]

    def test_others_run_themselves_uncompiled(self) -> None:
        (one,) = cpu_forwards(PlainForward(7, compiled=True), device_type="cpu", vocabulary=1000)
        assert (type(one), one.chunk, one.compiled) == (PlainForward, 7, False)

    def test_a_gpu_holds_more_logits_at_once(self) -> None:
        chunks = [
            cpu_forwards(AutoForward(), device_type=d, vocabulary=1 << 16)[0].chunk for d in ("cpu", "cuda")
        ]
        assert chunks == [1 << 10, 1 << 13]


class TestOptimizers:
    @pytest.mark.parametrize(
        ("factory", "state"),
        [
            (None, 8),
            (torch.optim.AdamW, 8),
            (partial(torch.optim.SGD, lr=0.1), 0),
            (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4),
            (bitsandbytes.optim.AdamW8bit, 2 + 2 * 4 / 256),  # two states, a scale for each block of 256
            (torch.optim.LBFGS, 8),  # wants a closure: taken for Adam
        ],
    )
    def test_states_are_counted(self, factory: Any, state: float) -> None:
        assert optimizer_memory(factory, device_type="cuda").state == pytest.approx(state, rel=0.01)

    def test_paged_states_leave_a_gpu_but_no_cpu(self) -> None:
        on_gpu, on_cpu = (
            optimizer_memory(bitsandbytes.optim.PagedAdamW8bit, device_type=device)
            for device in ("cuda", "cpu")
        )
        assert (on_gpu.state, on_gpu.paged) == (0, True)
        assert (round(on_cpu.state), on_cpu.paged) == (2, False)

    def test_all_weights_at_once_take_a_copy_of_them(self) -> None:
        """AdamW's denominators of all weights, as torch does it on a GPU unless fused; one after the other on a CPU."""
        assert optimizer_memory(torch.optim.AdamW, device_type="cuda").step == pytest.approx(4, rel=0.01)
        assert optimizer_memory(torch.optim.AdamW, device_type="cpu").step < 1
        assert optimizer_memory(None, device_type="cuda").step == pytest.approx(0, abs=0.01)

    def test_the_default_is_not_fused_where_scaled_gradients_are_clipped(self) -> None:
        found = optimizer_memory(None, device_type="cuda", clips_unscaled=True)
        assert found.step == pytest.approx(4, rel=0.01)
