"""Decoding steps of fixed shapes; on a GPU, recorded ones."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny_config
from support.sampling import EARLY, NEVER, PROMPTS, REQUESTS, engine, greedy, sampled
from support.tiny import Source, new_model, random_tokens, tiny_model
from transformers import LlamaForCausalLM, PreTrainedModel

from sppo_lightning.generation import AutoGenerator, SampleRequest, cuda_graph, fixed_steps, hf
from sppo_lightning.generation.cuda_graph import CannotRecordError, RecordedStep
from sppo_lightning.generation.fixed_steps import NAME, FixedSteps, parity_failure

LONG = 20  # tokens: enough that steps are recorded
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = ("llama", "qwen2", "qwen3", "granite", "cohere")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The steps of a GPU on a CPU, where they run as they are; the shapes that they had."""
    shapes: list[tuple[int, int]] = []
    own = FixedSteps._step

    def noted(steps: FixedSteps, rows: int, length: int) -> torch.Tensor:
        shapes.append((rows, length))
        return own(steps, rows, length)

    monkeypatch.setattr(FixedSteps, "_step", noted)
    monkeypatch.setattr(hf, "RECORDED_ON", ("cpu",))
    return shapes


def plain(source: Source, **settings: Any) -> Any:
    return sampled(source, REQUESTS, max_new_tokens=LONG, cuda_graphs=False, **settings)


@pytest.mark.parametrize("kind", FULL)
def test_responses_are_those_of_the_models_own_steps(kind: str, on_cpu: list[tuple[int, int]]) -> None:
    source = Source(tiny_model(kind), EARLY)
    expected = plain(source)
    assert not on_cpu
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == expected
    assert on_cpu
    assert len(set(expected.values())) > 20


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_room_that_is_looked_at_changes_nothing(
    block: int, on_cpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed_steps, "BLOCK", block)
    source = Source(tiny_model(), EARLY)
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)
    lengths = {length for _, length in on_cpu}
    assert all(length % block == 0 or length == 64 for length in lengths)
    assert len(lengths) > 2 or block == 64


@pytest.mark.parametrize("few", [0, 100])
def test_rows_that_leave_change_nothing(
    few: int, on_cpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 0 half of the rows leave as soon as they may; at 100 none does."""
    monkeypatch.setattr(fixed_steps, "FEW_ROWS", few)
    source = Source(tiny_model(), EARLY)
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)
    rows = [shape[0] for shape in on_cpu if shape[0] != 3]  # without the check's
    assert rows == sorted(rows, reverse=True)
    assert (len(set(rows)) == 1) == (few == 100)


def test_greedy_and_drawn_responses_in_one_batch(on_cpu: list[tuple[int, int]]) -> None:
    source = Source(tiny_model(), NEVER)
    expected = [one.token_ids for one in greedy(source, PROMPTS, max_new_tokens=LONG, cuda_graphs=False)]
    mixed = [*REQUESTS[:2], *(request._replace(seeds=()) for request in REQUESTS[2:])]
    mixed[3] = mixed[3]._replace(token_ids=PROMPTS[1])
    answers = {one.request: one.responses for one in engine(source, max_new_tokens=LONG).generate(mixed)}
    assert answers[3][0].token_ids == expected[1]
    drawn = sampled(source, REQUESTS[:2], max_new_tokens=LONG, cuda_graphs=False)
    assert [one.token_ids for one in answers[0]] == [
        drawn[REQUESTS[0].token_ids, seed] for seed in REQUESTS[0].seeds
    ]


def test_an_adapter_is_sampled_with(on_cpu: list[tuple[int, int]]) -> None:
    base: Any = new_model()
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    source = Source(model.eval(), EARLY)
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)
    assert on_cpu
    generator = engine(source, max_new_tokens=LONG)
    answers = []
    for switched in (nullcontext, model.disable_adapter, nullcontext):  # one engine, as in a run
        with switched():
            answers.append([one.responses for one in generator.generate(REQUESTS)])
    base = engine(Source(tiny_model(), EARLY), max_new_tokens=LONG, cuda_graphs=False)
    assert answers[0] == answers[2] != answers[1]
    assert answers[1] == [one.responses for one in base.generate(REQUESTS)]


def test_the_model_gets_its_own_attention_back(on_cpu: list[tuple[int, int]]) -> None:
    model = new_model().eval()
    source = Source(model, EARLY)
    generator = engine(source, max_new_tokens=LONG)
    assert model.config._attn_implementation == "sdpa"
    handle = model.register_forward_pre_hook(raise_behind_the_prompt, with_kwargs=True)
    with pytest.raises(RuntimeError, match=r"^behind the prompt$"):
        list(generator.generate(REQUESTS))
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)


def raise_behind_the_prompt(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs["input_ids"].shape[1] == 1 and "fixed_bias" in kwargs:
        raise RuntimeError("behind the prompt")


def test_a_step_that_cannot_be_recorded_later_on_is_taken_as_it_is(
    on_cpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The third step of the second batch."""
    caplog.set_level(logging.INFO, logger="sppo_lightning")
    source = Source(tiny_model(), EARLY)
    expected = plain(source)
    generator = engine(source, max_new_tokens=LONG, batch_size=12)
    batches: list[int] = []  # steps of each
    begin, own = FixedSteps.__enter__, FixedSteps._step

    def begins(steps: FixedSteps) -> FixedSteps:
        batches.append(0)
        return begin(steps)

    def fails(steps: FixedSteps, rows: int, length: int) -> torch.Tensor:
        batches[-1] += 1
        if len(batches) == 2 and batches[-1] == 3:
            raise CannotRecordError("it waits")
        return own(steps, rows, length)

    monkeypatch.setattr(FixedSteps, "__enter__", begins)
    monkeypatch.setattr(FixedSteps, "_step", fails)
    found = list(generator.generate(REQUESTS))
    assert {
        (REQUESTS[one.request].token_ids, seed): response.token_ids
        for one in found
        for seed, response in zip(REQUESTS[one.request].seeds, one.responses, strict=True)
    } == expected
    assert "Sampling without CUDA graphs from here on: it waits" in caplog.text
    assert batches[1:] == [3]
    list(generator.generate(REQUESTS))
    assert len(batches) == 2


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_row_that_is_done_stays_in_the_table_of_positions(
    cuda_graphs: bool, on_cpu: list[tuple[int, int]]
) -> None:
    """Of gpt2, which has 64: the long prompt's response ends there, long before the others."""
    source = Source(tiny_model("gpt2"), NEVER)
    short, long = random_tokens(4, 60)
    requests = [SampleRequest(short, tuple(range(6))), SampleRequest(long, (7,))]
    settings = {"max_new_tokens": 40, "max_total_tokens": 64, "cuda_graphs": cuda_graphs}
    found = sampled(source, requests, **settings)
    assert [len(tokens) for tokens in found.values()] == [40] * 6 + [4]
    assert found == sampled(source, requests, **settings, batch_size=1)
    assert bool(on_cpu) == cuda_graphs


# ------------------------------------------------------------------- what is not recorded


def refuses(model: PreTrainedModel) -> str | None:
    before = model.config._attn_implementation
    found = parity_failure(model)
    assert model.config._attn_implementation == before
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_that_are_read_alike_are_taken(dtype: torch.dtype) -> None:
    for kind in FULL:
        assert refuses(new_model(kind, dtype).eval()) is None, kind


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mistral", "its layers have a window"),
        ("gemma2", "it has layers of sliding_attention"),
        ("gemma3", "it has layers of sliding_attention"),
        ("qwen3_5", "it has layers of linear_attention"),
        ("lfm2", "it has layers of conv"),
    ],
)
def test_layers_of_another_kind_are_not(kind: str, reason: str) -> None:
    assert refuses(tiny_model(kind)) == reason


def test_an_attention_that_was_chosen_is_kept(on_cpu: list[tuple[int, int]]) -> None:
    model = new_model().eval()
    model.set_attn_implementation("eager")
    assert refuses(model) == "it attends by eager"
    source = Source(model, EARLY)
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)
    assert not on_cpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_reads_another_way_is_found_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that is looked at changes log-probs by more than rounding."""
    own = fixed_steps._attend

    def sees_everything(*states: Any, fixed_bias: torch.Tensor, **others: Any) -> Any:
        return own(*states, fixed_bias=torch.zeros_like(fixed_bias), **others)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, sees_everything)
    found = refuses(new_model("llama", dtype).eval())
    assert found is not None
    assert found.startswith("log-probs differ by ")


def test_an_engine_that_chooses_hands_the_setting_on() -> None:
    sampling = {"max_new_tokens": LONG, "temperature": 1.0}
    assert AutoGenerator(**sampling)._hf.cuda_graphs
    assert not AutoGenerator(cuda_graphs=False, **sampling)._hf.cuda_graphs


def test_short_responses_are_not_worth_it(on_cpu: list[tuple[int, int]]) -> None:
    source = Source(tiny_model(), EARLY)
    generator = engine(source, max_new_tokens=hf.WORTH_RECORDING - 1)
    list(generator.generate(REQUESTS))
    assert not on_cpu


def test_a_model_is_checked_once(on_cpu: list[tuple[int, int]]) -> None:
    generator = engine(Source(tiny_model(), EARLY), max_new_tokens=LONG)
    read = len(on_cpu)
    assert read == fixed_steps.PROBE_STEPS
    generator.unload()
    generator.load(Source(tiny_model(), EARLY))
    assert len(on_cpu) == read


def test_a_device_that_is_full_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fixed_steps, "_probe", full)
    with pytest.raises(torch.OutOfMemoryError):
        parity_failure(tiny_model())


# ------------------------------------------------------------------------------ on a GPU


def on_gpu(model: PreTrainedModel, **settings: Any) -> Source:
    return Source(copy.deepcopy(model).to("cuda").eval(), EARLY, **settings)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*FULL, "mistral", "gemma3"])
@pytest.mark.parametrize("few", [0, 100])
def test_recorded_steps_answer_as_the_models_own(
    kind: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of several shapes; layers with windows are not recorded."""
    monkeypatch.setattr(fixed_steps, "FEW_ROWS", few)
    monkeypatch.setattr(fixed_steps, "BLOCK", 16)
    replayed: list[tuple[int, int]] = []
    own = RecordedStep.replay

    def noted(graph: Any, shape: tuple[int, int], step: Any) -> torch.Tensor:
        replayed.append(shape)
        return own(graph, shape, step)

    monkeypatch.setattr(RecordedStep, "replay", noted)
    source = on_gpu(tiny_model(kind))
    assert sampled(source, REQUESTS, max_new_tokens=LONG) == plain(source)
    assert (len(set(replayed)) > 2) == (kind in FULL)


@pytest.mark.gpu
def test_recorded_responses_do_not_depend_on_the_batch() -> None:
    source = on_gpu(tiny_model())
    expected = sampled(source, REQUESTS, max_new_tokens=LONG)
    for batch_size in (1, 7):
        assert sampled(source, REQUESTS, max_new_tokens=LONG, batch_size=batch_size) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_recorded_steps_of_an_adapter_on_quantised_weights(quantization: str, tmp_path: Any) -> None:
    from support.models import byte_tokenizer

    from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
    from sppo_lightning.policy.loading import load_policy

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path), quantization=quantization, lora=LoRAConfig(rank=4, alpha=8))  # type: ignore[arg-type]
    model = load_policy(config, compute_dtype=torch.bfloat16, device=torch.device("cuda")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert parity_failure(model) is None


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_leaves_the_gpu_usable() -> None:
    model: Any = copy.deepcopy(tiny_model()).to("cuda").eval()  # type: ignore[arg-type]
    handle = model.model.layers[1].mlp.register_forward_hook(waits_for_the_device)
    reason = refuses(model)
    handle.remove()
    assert reason is not None
    assert "synchronizing CUDA operation" in reason
    usable()
    assert refuses(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_recording_that_fails_leaves_the_gpu_usable(error: BaseException) -> None:
    """What waits unseen by torch, and a signal."""
    model: Any = copy.deepcopy(tiny_model()).to("cuda").eval()  # type: ignore[arg-type]

    def fails(*args: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise error

    handle = model.model.layers[1].mlp.register_forward_hook(fails)
    if isinstance(error, Exception):
        assert refuses(model) == "no"
    else:
        with pytest.raises(KeyboardInterrupt):
            parity_failure(model)
    handle.remove()
    usable()
    assert refuses(model) is None


@pytest.mark.gpu
def test_a_recording_that_waits_leaves_the_gpu_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, had it not been seen before."""
    monkeypatch.setattr(cuda_graph, "_run_without_waiting", lambda step: step())
    model: Any = copy.deepcopy(tiny_model()).to("cuda").eval()  # type: ignore[arg-type]
    handle = model.model.layers[1].mlp.register_forward_hook(waits_for_the_device)
    assert refuses(model) is not None
    handle.remove()
    usable()
    assert refuses(model) is None


def usable() -> None:
    """Random numbers are drawn, and memory is given back."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").isfinite().all()
    before = torch.cuda.memory_reserved()
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def waits_for_the_device(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * float(output.isfinite().all())


@pytest.mark.gpu
def test_the_memory_of_recorded_steps_is_given_back() -> None:
    source = on_gpu(tiny_model())
    generator = engine(source, max_new_tokens=LONG)
    list(generator.generate(REQUESTS))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        list(generator.generate(REQUESTS))
    assert torch.cuda.memory_allocated() == before
    generator.unload()
