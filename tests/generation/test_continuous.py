"""Continuous batching: the engine, the check that it reproduces the policy, and the choice of an engine."""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributions import chi_square
from support.models import byte_tokenizer, tiny_config
from support.tiny import CONFIGS, END, Source, random_tokens, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sppo_lightning.generation import Generator, HFGenerator, PromptResponses, SampleRequest
from sppo_lightning.generation.auto import (
    AutoGenerator,
    Rates,
    continuous_is_worth_it,
    faster_engine,
    sampling_rate,
    timed_requests,
)
from sppo_lightning.generation.continuous import ContinuousBatchingGenerator
from sppo_lightning.generation.parity import (
    ParityError,
    ProbeAnswer,
    check_parity,
    gap_tolerance,
    logit_gaps,
    probe_prompts,
)
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy
from sppo_lightning.types import Response, UserError

LONGEST = 12
PROMPTS = random_tokens(3, 1, 40, 17)  # over and under the sliding windows of 6
NEVER: frozenset[int] = frozenset()
EARLY = frozenset(range(END, 259, 6))  # one token in six ends a response
REPRODUCED = [kind for kind in CONFIGS if kind != "gemma2"]  # whose soft-capped attention the engine lacks


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The engine collects garbage whenever it stops: spare it the thousands of objects that were there before."""
    gc.freeze()
    yield
    gc.unfreeze()


LOADED: list[ContinuousBatchingGenerator] = []


@pytest.fixture(autouse=True)
def unload() -> Iterator[None]:
    """The engine's cache hangs on the model, which other tests use too."""
    yield
    while LOADED:
        LOADED.pop().unload()


def engine(policy: Source, **settings: Any) -> ContinuousBatchingGenerator:
    generator = ContinuousBatchingGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    LOADED.append(generator)
    return generator


def answer(generator: Generator, requests: Sequence[SampleRequest]) -> list[list[Response]]:
    """Answer requests; the result is in request order."""
    answers = list(generator.generate(requests))
    assert sorted(one.request for one in answers) == list(range(len(requests)))
    return [one.responses for one in sorted(answers, key=lambda one: one.request)]


def hf_answer(policy: Source, requests: Sequence[SampleRequest], **settings: Any) -> list[list[Response]]:
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    return answer(generator, requests)


def greedy(*prompts: tuple[int, ...]) -> list[SampleRequest]:
    return [SampleRequest(prompt, ()) for prompt in prompts]


def sampled(*prompts: tuple[int, ...], count: int = 3) -> list[SampleRequest]:
    return [SampleRequest(prompt, tuple(range(100 * n, 100 * n + count))) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A policy in training: a frozen base and an adapter that does something."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    return with_adapter(folder)


def with_adapter(folder: Path, **changes: Any) -> nn.Module:
    lora = LoRAConfig(rank=4, alpha=8)
    torch.manual_seed(1)
    model = load_policy(PolicyConfig(str(folder), lora=lora, **changes), compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


# --------------------------------------------------------------------- greedy


@pytest.mark.parametrize("kind", REPRODUCED)
def test_greedy_answers_are_those_of_hf_generator(kind: str) -> None:
    """End tokens, lengths and texts among them."""
    requests = greedy(*PROMPTS, *random_tokens(250, 300, seed=2))  # up to a page of 256, and over one
    for ends, finishes in ((EARLY, {"stop", "length"}), (NEVER, {"length"})):
        source = Source(tiny_model(kind), ends)
        found = answer(engine(source), requests)
        assert found == hf_answer(source, requests)
        assert {one.finish_reason for (one,) in found} <= finishes


def test_an_adapter_is_part_of_the_policy(adapted: nn.Module) -> None:
    source = Source(adapted, NEVER)
    found = answer(engine(source), greedy(*PROMPTS))
    assert found == hf_answer(source, greedy(*PROMPTS))
    with adapted.disable_adapter():  # type: ignore[operator]
        base = answer(engine(source), greedy(*PROMPTS))
        assert base == hf_answer(source, greedy(*PROMPTS))
    assert base != found


def test_a_response_never_exceeds_its_own_limit() -> None:
    source = Source(tiny_model(), NEVER)
    (short,), (long,) = answer(engine(source, max_total_tokens=20), greedy(*random_tokens(15, 2)))
    assert (len(short.token_ids), short.finish_reason) == (5, "length")
    assert (len(long.token_ids), long.finish_reason) == (LONGEST, "length")


def test_prompts_that_begin_alike_share_pages() -> None:
    """Whole pages of 256 tokens: the prompt itself, one token more, and another ending."""
    (base,) = random_tokens(257)
    source = Source(tiny_model(), NEVER)
    requests = greedy(base, base, base[:256], (*base[:256], 5), base)
    assert answer(engine(source, batch_size=2), requests) == hf_answer(source, requests)


def test_greedy_and_sampled_requests_may_be_mixed() -> None:
    source = Source(tiny_model(), EARLY)
    requests = [greedy(PROMPTS[0])[0], *sampled(PROMPTS[1], PROMPTS[2]), greedy(PROMPTS[3])[0]]
    found = answer(engine(source), requests)
    assert [len(responses) for responses in found] == [1, 3, 3, 1]
    assert [found[0], found[3]] == hf_answer(source, greedy(PROMPTS[0], PROMPTS[3]))


def test_nothing_asked_nothing_answered() -> None:
    assert list(engine(Source(tiny_model())).generate([])) == []


def test_a_load_takes_the_policy_as_it_is_now() -> None:
    """A page that outlived a change of the weights would answer for the old policy."""
    (prompt,) = random_tokens(300)
    source = Source(copy.deepcopy(tiny_model()), NEVER)
    generator = engine(source)
    first = answer(generator, greedy(prompt))
    generator.unload()
    with torch.no_grad():
        for parameter in source.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    generator.load(source)
    second = answer(generator, greedy(prompt))
    assert second == hf_answer(source, greedy(prompt))
    assert second != first


# -------------------------------------------------------------------- sampled


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 5, "temperature": 2.0}, {"top_p": 0.8}]
)
def test_first_tokens_follow_the_models_distribution(settings: dict[str, Any]) -> None:
    """Against a plain forward pass, warped by hand."""
    model, (prompt,) = tiny_model(), random_tokens(2)
    generator = engine(Source(model, NEVER), max_new_tokens=1, batch_size=100, **settings)
    (found,) = answer(generator, sampled(prompt, count=1000))
    probs = (model(torch.tensor([prompt])).logits[0, -1].double() / settings.get("temperature", 1.0)).softmax(
        -1
    )
    ranked = probs.sort(descending=True)
    keep = settings.get("top_k", len(probs))
    if "top_p" in settings:
        keep = int((ranked.values.cumsum(-1) < settings["top_p"]).sum()) + 1
    probs[ranked.indices[keep:]] = 0
    assert chi_square(torch.tensor([one.token_ids[0] for one in found]), probs / probs.sum()) < 1


def test_whole_responses_follow_the_models_distribution() -> None:
    """The two most likely tokens, three times in a row: eight responses, with the product of their probabilities."""
    model, (prompt,) = tiny_model(), random_tokens(2)
    generator = engine(Source(model, NEVER), max_new_tokens=3, batch_size=100, top_k=2, temperature=3.0)
    (found,) = answer(generator, sampled(prompt, count=1000))
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown: dict[tuple[int, ...], float] = {}
        for tokens, probability in expected.items():
            top = (model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double() / 3).topk(2)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                grown[(*tokens, token)] = probability * share
        expected = grown
    number = {tokens: index for index, tokens in enumerate(expected)}
    drawn = torch.tensor([number[one.token_ids] for one in found])
    assert chi_square(drawn, torch.tensor(list(expected.values()))) < 1


def test_a_batch_is_a_function_of_its_requests() -> None:
    """Whatever was drawn before, and whether the engine just started or sampled already."""
    source, requests = Source(tiny_model(), EARLY), sampled(*PROMPTS)
    generator = engine(source, batch_size=5)
    first = answer(generator, requests)
    torch.rand(7)
    assert answer(generator, requests) == first
    assert answer(engine(source, batch_size=5), requests) == first
    others = [request._replace(seeds=tuple(seed + 1 for seed in request.seeds)) for request in requests]
    assert answer(generator, others) != first
    assert len({one.token_ids for responses in first for one in responses}) == 12
    assert not generator.reproducible


def test_a_request_may_be_longer_than_those_before() -> None:
    source, prompts = Source(tiny_model(), NEVER), random_tokens(4, 600)
    generator = engine(source, batch_size=1)  # whose cache holds two pages for short requests
    for prompt in prompts:
        assert answer(generator, greedy(prompt)) == hf_answer(source, greedy(prompt))


def test_responses_do_not_come_shortest_first() -> None:
    """As they are completed: what takes the first of them would take the shortest."""
    found = answer(engine(Source(tiny_model(), EARLY)), sampled(*PROMPTS))
    lengths = [[len(one.token_ids) for one in responses] for responses in found]
    assert any(row != sorted(row) for row in lengths)


def test_torchs_random_state_is_left_as_found() -> None:
    source = Source(tiny_model(), EARLY)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    answer(engine(source), sampled(*PROMPTS))
    assert torch.equal(torch.rand(4), expected)


def test_a_request_is_answered_once_its_own_responses_are_complete() -> None:
    source = Source(tiny_model(), NEVER)
    prompts = random_tokens(8, 38)  # with at most 40 tokens together, the second response ends first
    generator = engine(source, max_new_tokens=30, max_total_tokens=40)
    assert [one.request for one in generator.generate(sampled(*prompts, count=2))] == [1, 0]


# ------------------------------------------------- the policy is left as found


def training_state(model: nn.Module) -> list[Any]:
    """Everything that an engine might change on a model."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return [dict(vars(inner.config)), dict(vars(inner.generation_config)), names, hooks]


def loss_gradients(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.train()
    ids = torch.tensor(random_tokens(20, 20))
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_training_forward_after_sampling_is_the_one_before(attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=attention)
    check_left_as_found(model)


def test_a_policy_with_an_adapter_is_left_as_found(adapted: nn.Module) -> None:
    check_left_as_found(adapted)


def check_left_as_found(model: nn.Module) -> None:
    source = Source(model, EARLY)
    state, (logits, gradients) = training_state(model), loss_gradients(model)
    generator = engine(source)
    assert training_state(model)[:2] == state[:2]  # between two calls, too
    answer(generator, sampled(*PROMPTS))
    assert training_state(model)[:2] == state[:2]
    next(generator.generate(sampled(*PROMPTS)))  # dropped half-way
    generator.unload()
    assert training_state(model) == state
    after, found = loss_gradients(model)
    assert torch.equal(after, logits)
    assert found
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))


def test_an_answer_may_be_dropped_half_way_and_asked_again() -> None:
    generator, requests = engine(Source(tiny_model(), NEVER)), sampled(*PROMPTS)
    expected = answer(generator, requests)
    for _ in range(2):
        answers = generator.generate(requests)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert answer(generator, requests) == expected


def test_sampling_works_inside_inference_mode() -> None:
    """As where Lightning asks for the answers of `test` and `predict`."""
    with torch.inference_mode():
        source = Source(copy.deepcopy(tiny_model()), EARLY)
        found = answer(engine(source), greedy(*PROMPTS))
    assert found == hf_answer(Source(tiny_model(), EARLY), greedy(*PROMPTS))


# --------------------------------------------------------------------- parity


@contextmanager
def faulty(model: nn.Module, fault: Any) -> Iterator[None]:
    """Let ``fault(logits)`` happen to what the engine, and it alone, gets from the model."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if "cu_seq_lens_q" in kwargs:
            output.logits = fault(output.logits)
        return output

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


REFUSED = (
    r"^ContinuousBatchingGenerator does not reproduce the policy: a greedy token lies .* below the best logit of "
    r"the plain forward \(tolerance .*\): use sppo_lightning\.generation\.HFGenerator$"
)
DRIFTED = (
    r"^ContinuousBatchingGenerator does not reproduce the policy: its log-probs lie .* nat per token off those of "
    r"the plain forward \(tolerance .*\): use sppo_lightning\.generation\.HFGenerator$"
)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gemma3", torch.float64),
        ("gemma3", torch.bfloat16),
    ],
)
def test_rounding_passes_and_garbage_does_not(kind: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model(kind)).to(dtype)
    engine(Source(model)).unload()
    with faulty(model, lambda logits: logits.roll(1, -1)), pytest.raises(ParityError, match=REFUSED):
        engine(Source(model))
    with faulty(model, lambda logits: logits * 1.5), pytest.raises(ParityError, match=DRIFTED):
        engine(Source(model))  # the best token is still the best


def test_soft_capped_attention_is_refused() -> None:
    """The paged attention of transformers leaves the cap of Gemma 2 out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"], attn_implementation="eager").eval()
    before = dict(vars(model.config))
    with pytest.raises(ParityError, match=DRIFTED):
        engine(Source(model))
    assert dict(vars(model.config)) == before


def test_an_engine_that_cannot_start_is_refused_and_leaves_the_policy_as_found() -> None:
    """It switches the model's attention before it asks for memory."""
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager").eval()
    before = dict(vars(model.config))
    with pytest.raises(
        ParityError, match=r"cannot run the policy \(Memory footprint .*\): use sppo_lightning"
    ):
        engine(Source(model), batch_size=10**8)
    assert dict(vars(model.config)) == before


def test_an_engine_that_fails_is_refused() -> None:
    model = copy.deepcopy(tiny_model())

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    message = r"^ContinuousBatchingGenerator cannot run the policy \(no such kernel\): use sppo_lightning\."
    with faulty(model, fail), pytest.raises(ParityError, match=message):
        engine(Source(model))


def test_an_engine_that_fails_later_says_so() -> None:
    source = Source(copy.deepcopy(tiny_model()))
    generator = engine(source)

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    message = (
        r"^continuous batching failed \(out of memory\): lower data\.generator\.init_args\.batch_size, or use "
        r"sppo_lightning\.generation\.HFGenerator$"
    )
    with faulty(source.model, fail), pytest.raises(UserError, match=message):
        answer(generator, sampled(*PROMPTS))
    assert answer(generator, greedy(*PROMPTS)) == hf_answer(source, greedy(*PROMPTS))


@pytest.fixture(scope="module")
def policy_of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 64 features: what 4-bit blocks need."""
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_quantised_weights_go_through_the_same_check(policy_of_64: Path) -> None:
    """NF4 passes it; when it does not, the error names the weights."""
    source = Source(with_adapter(policy_of_64, quantization="nf4"))
    assert answer(engine(source), greedy(*PROMPTS)) == hf_answer(source, greedy(*PROMPTS))
    inner: Any = source.model
    message = REFUSED.replace("the policy:", r"the policy's quantised weights \(bitsandbytes\):")
    fault = faulty(inner.get_base_model(), lambda logits: logits.roll(1, -1))
    with fault, pytest.raises(ParityError, match=message):
        engine(source)


def test_gaps_are_those_to_the_best_logit() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, -9.0]])
    assert logit_gaps(logits, torch.tensor([2, 0])).tolist() == [0.5, 0.0]


def test_the_tolerance_of_a_gap_grows_with_the_logits_and_the_rounding() -> None:
    """bfloat16 has eps 2^-7: 4 * 2^-7 * 32 = 1; float32 has 2^-23, so that the floor of 1e-3 holds."""
    logits = torch.tensor([[-32.0, 8.0], [1.0, -0.5]])
    assert gap_tolerance(logits, 2.0**-7).tolist() == [1.0, 0.03125]
    assert gap_tolerance(logits, 2.0**-23).tolist() == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("fault", ["tokens", "log-probs"])
def test_what_is_not_a_number_is_refused(fault: str) -> None:
    model = copy.deepcopy(tiny_model())

    def answers(prompts: Sequence[tuple[int, ...]]) -> list[ProbeAnswer]:
        return [ProbeAnswer([4, 5], [math.nan, 0.0]) for _ in prompts]

    if fault == "tokens":
        model.lm_head.weight.data[9] = math.nan
        message = "a greedy token lies nan below"
    else:
        model.lm_head.weight.data.zero_()  # every token is the best one
        message = "log-probs lie nan nat per token"
    with pytest.raises(ParityError, match=message):
        check_parity(model, answers, engine="An engine", vocabulary=259)


def test_probe_prompts_are_fixed_and_fit_the_context() -> None:
    prompts = probe_prompts(50, 512)
    assert prompts == probe_prompts(50, 512)
    assert [len(prompt) for prompt in prompts] == [2, 7, 30, 250]
    assert max(token for prompt in prompts for token in prompt) == 49
    assert probe_prompts(50, 36) == [prompt[:20] for prompt in prompts]
    assert probe_prompts(50, 8) == [prompt[:1] for prompt in prompts]


# ------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"^ContinuousBatchingGenerator\.batch_size=0 must be at least 1$"),
        (
            {"stop": ["\n"]},
            r"^ContinuousBatchingGenerator\.stop=\['\\n'\] cannot be honoured, since its engine ends responses at "
            r"end tokens only: use sppo_lightning\.generation\.HFGenerator$",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousBatchingGenerator(**{"max_new_tokens": 4, "temperature": 1.0, **settings})


# ----------------------------------------------------------------- the choice


def test_continuous_batching_must_be_clearly_faster() -> None:
    assert not continuous_is_worth_it(Rates(hf=100.0, continuous=110.0))
    assert continuous_is_worth_it(Rates(hf=100.0, continuous=111.0))


def test_a_cpu_keeps_the_reproducible_engine() -> None:
    source, requests = Source(tiny_model(), EARLY), sampled(*PROMPTS)
    generator = AutoGenerator(batch_size=4, max_new_tokens=LONGEST, temperature=0.8, top_k=50, stop=["qq"])
    assert generator.reproducible
    for _ in range(2):
        generator.load(source)
        found = answer(generator, requests)
        generator.unload()
        assert found == hf_answer(source, requests, temperature=0.8, top_k=50)


def test_the_faster_engine_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    hf = HFGenerator(max_new_tokens=2, temperature=1.0)
    continuous = ContinuousBatchingGenerator(max_new_tokens=2, temperature=1.0)
    source, requests = Source(tiny_model(), NEVER), sampled(*PROMPTS)
    with caplog.at_level(logging.INFO, "sppo_lightning"):
        assert faster_engine(hf, continuous, source, requests) is hf
    (record,) = caplog.records
    assert record.message.startswith("Sampling with HFGenerator: HFGenerator makes ")
    assert record.message.endswith(" tokens/s here, continuous batching " + record.message.split()[-1])


def refused(self: HFGenerator, policy: Any) -> None:
    raise UserError("HFGenerator cannot sample from this one")


def test_continuous_batching_is_taken_where_the_other_engine_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFGenerator, "load", refused)
    hf = HFGenerator(max_new_tokens=2, temperature=1.0)
    continuous = ContinuousBatchingGenerator(max_new_tokens=2, temperature=1.0)
    with caplog.at_level(logging.INFO, "sppo_lightning"):
        assert faster_engine(hf, continuous, Source(tiny_model(), NEVER), sampled(*PROMPTS)) is continuous
    assert caplog.messages == ["Sampling with continuous batching: HFGenerator cannot sample from this one"]


def test_where_both_are_refused_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFGenerator, "load", refused)
    generator = AutoGenerator(max_new_tokens=2, temperature=1.0)
    with caplog.at_level(logging.INFO, "sppo_lightning"), pytest.raises(UserError, match=r"from this one$"):
        generator.load(Source(tiny_model(), NEVER))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        (0, "ContinuousBatchingGenerator cannot run the policy (out of memory)"),
        (40, "continuous batching failed (out of memory)"),  # after the check
    ],
)
def test_an_engine_that_fails_is_not_taken_and_it_is_said_why(
    sound: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    hf = HFGenerator(max_new_tokens=40, temperature=1.0)
    continuous = ContinuousBatchingGenerator(max_new_tokens=40, temperature=1.0)
    model = copy.deepcopy(tiny_model())
    forwards = iter(range(sound))

    def fail_at_last(logits: torch.Tensor) -> torch.Tensor:
        if next(forwards, None) is None:
            raise RuntimeError("out of memory")
        return logits

    with faulty(model, fail_at_last), caplog.at_level(logging.INFO, "sppo_lightning"):
        assert faster_engine(hf, continuous, Source(model, NEVER), sampled(*PROMPTS)) is hf
    (record,) = [one for one in caplog.records if one.name.startswith("sppo_lightning")]
    assert record.message.startswith(f"Sampling with HFGenerator: {reason}")


class Slow(Generator):
    """Answers with three tokens a request, after a wait that its first round does not have."""

    def __init__(self) -> None:
        super().__init__(max_new_tokens=3, temperature=1.0)
        self.calls: list[str] = []

    def load(self, policy: Any) -> None:
        self.calls.append("load")

    def unload(self) -> None:
        self.calls.append("unload")

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        self.calls.append("generate")
        for index in range(len(requests)):
            yield PromptResponses(index, [Response((1, 2, 3), "abc", "length")])


def test_a_rate_counts_tokens_of_the_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("sppo_lightning.generation.auto.time.perf_counter", lambda: next(clock))
    slow = Slow()
    assert sampling_rate(slow, Source(tiny_model()), greedy(*PROMPTS)) == 6.0  # 4 requests of 3 tokens in 2 s
    assert slow.calls == ["load", "generate", "generate", "unload"]


def test_timed_requests_are_fixed_and_short_enough() -> None:
    assert timed_requests(50, None) == timed_requests(50, None)
    assert {len(request.token_ids) for request in timed_requests(50, None)} == {64}
    assert {len(request.token_ids) for request in timed_requests(50, 20)} == {10}
    assert len({seed for request in timed_requests(50, None) for seed in request.seeds}) == 64
