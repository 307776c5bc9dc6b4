"""vLLM in the training process, against a stand-in that holds its caller to vLLM's documented API.

The stand-in has the documented signatures, refuses what the real one refuses, and samples with a real tiny model made
from the config and the weights that it is handed.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import transformers
from support.models import byte_tokenizer, tiny_config
from support.tiny import CONFIGS, END, Source, random_tokens, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from sppo_lightning.generation import Generator, HFGenerator, SampleRequest
from sppo_lightning.generation.parity import ParityError
from sppo_lightning.generation.vllm import VLLMGenerator
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_policy
from sppo_lightning.policy.merging import merged_weights
from sppo_lightning.types import Response, UserError

LONGEST = 12
PROMPTS = random_tokens(3, 1, 40)
EARLY = frozenset(range(END, 259, 6))
NEVER: frozenset[int] = frozenset()


# ------------------------------------------------------------------ stand-in


@dataclass(kw_only=True)
class SamplingParams:
    """The documented fields that a caller may set, and the documented checks of those used here."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.top_k >= -1
        assert self.max_tokens is None or self.max_tokens >= 1
        assert self.seed is None or type(self.seed) is int
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class Started:
    """What became of the engine that the code under test started."""

    calls: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    params: list[SamplingParams] = field(default_factory=list)
    forget: str | None = None  # a weight that gets lost on the way
    finish_reason: str | None = None  # of every response, whatever ended it


STARTED = Started()


@dataclass
class Platform:
    device_type: str = "cuda"

    def is_sleep_mode_available(self) -> bool:
        return self.device_type != "cpu"


class LLM:
    """One engine: ``weights`` and ``kv_cache`` are asleep or awake."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        # from here on by **kwargs, as fields of EngineArgs
        load_format: str = "auto",
        max_model_len: int | None = None,
        generation_config: str = "auto",
        enable_sleep_mode: bool = False,
    ) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "weights cannot be handed over in memory"
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        self.folder = Path(model)
        config = AutoConfig.from_pretrained(model)
        (architecture,) = config.architectures
        assert load_format == "dummy", "the folder holds no weights"
        assert generation_config == "vllm", "the folder holds no generation config"
        self.model = getattr(transformers, architecture)(config).to(getattr(torch, dtype)).eval()
        self.tokenizer = None if skip_tokenizer_init else AutoTokenizer.from_pretrained(model)
        self.limit = max_model_len or config.max_position_embeddings
        self.asleep: set[str] = set()
        self.may_sleep = enable_sleep_mode
        STARTED.settings = {"dtype": dtype, "gpu_memory_utilization": gpu_memory_utilization}
        STARTED.calls.append("start")

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.may_sleep
        STARTED.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        STARTED.calls.append(f"wake {tags}")
        self.asleep -= set(tags or ["weights", "kv_cache"])

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        assert not self.asleep
        STARTED.calls.append("reset_prefix_cache")
        return True

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert method == "reload_weights"
        STARTED.calls.append(method)
        self.reload_weights(*args, **(kwargs or {}))
        return [None]

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        assert "weights" not in self.asleep, "no memory for the weights"
        assert "kv_cache" in self.asleep, "the cache takes the memory that the weights need"
        assert weights_iterator is not None, "there are no weights on disk"
        assert is_checkpoint_format
        known = dict(self.model.named_parameters())
        for name, weight in weights_iterator:
            if name not in known:
                raise ValueError(f"There is no module or parameter named {name!r}")
            if name != STARTED.forget:
                known[name].data.copy_(weight)

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        assert not self.asleep
        assert not use_tqdm
        assert len(prompts) == len(sampling_params)
        STARTED.params = list(sampling_params)
        return [
            RequestOutput(
                str(number), prompt["prompt_token_ids"], [self._complete(**prompt, params=params)], True
            )
            for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    @torch.no_grad()
    def _complete(self, *, prompt_token_ids: list[int], params: SamplingParams) -> CompletionOutput:
        assert type(prompt_token_ids) is list
        assert params.max_tokens is not None
        assert not params.detokenize or self.tokenizer is not None
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(params.seed)
        tokens: list[int] = []
        logps: list[dict[int, Logprob]] = []
        finish, reason, text = "length", None, ""
        if len(prompt_token_ids) >= self.limit:
            raise ValueError(f"the prompt is longer than the maximum model length of {self.limit}")
        while len(tokens) < params.max_tokens and len(prompt_token_ids) + len(tokens) < self.limit:
            logits = self.model(torch.tensor([prompt_token_ids + tokens])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                probs = (logits / params.temperature).softmax(-1)
                token = int(torch.multinomial(probs, 1, generator=generator))
            tokens.append(token)
            logps.append({token: Logprob(float(logits.log_softmax(-1)[token]))})
            if self.tokenizer is not None and params.detokenize:
                text = self.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
            stops = [stop for stop in params.stop or () if stop in text]
            if token in (params.stop_token_ids or ()) or stops:
                finish, reason = "stop", (stops or [token])[0]
                break
            assert params.ignore_eos or token != self.model.config.eos_token_id
        return CompletionOutput(
            index=0,
            text=text,
            token_ids=tuple(tokens),
            cumulative_logprob=None,
            logprobs=logps if params.logprobs is not None else None,
            finish_reason=STARTED.finish_reason or finish,
            stop_reason=reason,
        )


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Install the stand-in."""
    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = Platform()
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    global STARTED
    STARTED = Started()
    return STARTED


# ---------------------------------------------------------------------- tools


def engine(policy: Source, **settings: Any) -> VLLMGenerator:
    generator = VLLMGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    return generator


def answer(generator: Generator, requests: Sequence[SampleRequest]) -> list[list[Response]]:
    answers = list(generator.generate(requests))
    assert [one.request for one in answers] == list(range(len(requests)))
    return [one.responses for one in answers]


def hf_answer(policy: Source, requests: Sequence[SampleRequest], **settings: Any) -> list[list[Response]]:
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    answers = sorted(generator.generate(requests), key=lambda one: one.request)
    return [one.responses for one in answers]


def greedy(*prompts: tuple[int, ...]) -> list[SampleRequest]:
    return [SampleRequest(prompt, ()) for prompt in prompts]


def weights(generator: VLLMGenerator) -> dict[str, Tensor]:
    found: nn.Module = generator._llm.model
    return {name: parameter.detach() for name, parameter in found.named_parameters()}


def adapted(folder: Path, dtype: Any = "float32", **changes: Any) -> Any:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, attention_bias=True)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = PolicyConfig(str(folder), dtype=dtype, lora=LoRAConfig(rank=4, alpha=8), **changes)
    model = load_policy(config, compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


# -------------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_answers_are_those_of_hf_generator(kind: str, started: Started) -> None:
    source = Source(tiny_model(kind), EARLY)
    found = answer(engine(source), greedy(*PROMPTS))
    assert found == hf_answer(source, greedy(*PROMPTS))
    assert {one.finish_reason for (one,) in found} <= {"stop", "length"}
    assert started.params == [
        SamplingParams(
            temperature=0.0,
            max_tokens=LONGEST,
            stop_token_ids=sorted(EARLY),
            ignore_eos=True,
            detokenize=False,
        )
    ] * len(PROMPTS)


def test_an_end_token_finishes_a_response_and_a_limit_cuts_it() -> None:
    free = answer(engine(Source(tiny_model(), NEVER)), greedy(PROMPTS[0]))[0][0].token_ids
    place = next(index for index in range(2, LONGEST) if free[index] not in free[:index])
    source = Source(tiny_model(), frozenset({free[place]}))
    ((whole,),) = answer(engine(source, max_new_tokens=place + 1), greedy(PROMPTS[0]))
    ((cut,),) = answer(engine(source, max_new_tokens=place), greedy(PROMPTS[0]))
    assert (whole.token_ids, whole.finish_reason) == (free[: place + 1], "stop")
    assert (cut.token_ids, cut.finish_reason) == (free[:place], "length")


def test_a_stop_string_ends_a_response_and_stays_out_of_its_text() -> None:
    source = Source(tiny_model(), NEVER)
    ((free,),) = answer(engine(source), greedy(PROMPTS[0]))
    stop = [free.text[3:5]]
    found = answer(engine(source, stop=stop), greedy(*PROMPTS))
    assert found == hf_answer(source, greedy(*PROMPTS), stop=stop)
    assert found[0][0].finish_reason == "stop"
    assert stop[0] not in found[0][0].text


def test_each_response_is_sampled_with_its_own_seed(started: Started) -> None:
    source = Source(tiny_model(), EARLY)
    generator = engine(source, temperature=0.7, top_p=0.9, top_k=40)
    requests = [
        SampleRequest(PROMPTS[0], (11, 2**62)),
        greedy(PROMPTS[1])[0],
        SampleRequest(PROMPTS[2], (13,)),
    ]
    found = answer(generator, requests)
    assert [len(responses) for responses in found] == [2, 1, 1]
    assert [one.seed for one in started.params] == [11, 2**62, None, 13]
    warps = [(one.temperature, one.top_p, one.top_k) for one in started.params]
    assert warps == [(0.7, 0.9, 40), (0.7, 0.9, 40), (0.0, 1.0, 0), (0.7, 0.9, 40)]
    assert {one.n for one in started.params} == {1}
    again = answer(generator, [requests[2], requests[0]])
    assert again == [found[2], found[0]]
    assert found[0][0] != found[0][1]


def test_a_response_never_exceeds_its_own_limit(started: Started) -> None:
    generator = engine(Source(tiny_model(), NEVER), max_total_tokens=30)
    found = answer(generator, greedy(*random_tokens(25, 4)))
    assert [len(one.token_ids) for (one,) in found] == [5, LONGEST]
    assert [one.max_tokens for one in started.params] == [5, LONGEST]


def test_nothing_asked_nothing_answered() -> None:
    assert list(engine(Source(tiny_model())).generate([])) == []


def test_a_response_that_vllm_gives_up_is_an_error(started: Started) -> None:
    generator = engine(Source(tiny_model()))
    started.finish_reason = "abort"
    with pytest.raises(
        UserError, match=r"^vLLM gave up a response \(finish_reason='abort'\): see its log above$"
    ):
        answer(generator, greedy(PROMPTS[0]))


# -------------------------------------------------------------------- weights


def test_vllm_sleeps_between_two_loads_and_gets_the_weights_of_each(started: Started) -> None:
    source = Source(copy.deepcopy(tiny_model()), NEVER)
    generator = engine(source)
    for name, weight in source.model.named_parameters():
        assert torch.equal(weights(generator)[name], weight), name
    first = answer(generator, greedy(*PROMPTS))
    generator.unload()
    assert all(bool(weight.isnan().all()) for weight in weights(generator).values())
    with torch.no_grad():
        for parameter in source.model.parameters():
            parameter.mul_(1.1)
    generator.load(source)
    second = answer(generator, greedy(*PROMPTS))
    generator.unload()
    assert second == hf_answer(source, greedy(*PROMPTS))
    assert second != first
    woken = ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "reset_prefix_cache", "sleep 2"]
    assert started.calls == ["start", "sleep 2", *woken, *woken]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, dtype: str, started: Started) -> None:
    model = adapted(tmp_path, dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = Source(model, NEVER)
    generator = engine(source)
    assert started.settings["dtype"] == dtype
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    found = weights(generator)
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        assert torch.equal(found[name], weight), name
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], before[BASE_WEIGHT])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    if dtype == "float32":
        assert answer(generator, greedy(*PROMPTS)) == hf_answer(source, greedy(*PROMPTS))


BASE_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def test_an_adapter_that_is_switched_off_stays_out(tmp_path: Path) -> None:
    """As where the policy that the run started from answers."""
    model = adapted(tmp_path)
    with model.disable_adapter():
        found = dict(merged_weights(model))
    base = dict(LlamaForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], weight) for name, weight in base.items())


def test_tied_weights_are_handed_over_once() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()
    assert "lm_head.weight" not in dict(merged_weights(model))
    source = Source(model, NEVER)
    assert answer(engine(source), greedy(*PROMPTS)) == hf_answer(source, greedy(*PROMPTS))


def test_a_weight_lost_on_the_way_is_noticed_and_vllm_put_to_sleep(started: Started) -> None:
    started.forget = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ParityError, match=r"^VLLMGenerator does not reproduce the policy: "):
        engine(Source(tiny_model()))
    assert started.calls[-1] == "sleep 2"


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = Source(adapted(tmp_path, "auto", quantization="nf4"))
    message = (
        r"^VLLMGenerator takes 16-bit weights, but the policy's are quantised, and an adapter is never merged into "
        r"those: set model\.policy\.quantization: none, or use sppo_lightning\.generation\.HFGenerator$"
    )
    with pytest.raises(UserError, match=message):
        engine(source)


# ------------------------------------------------------------------- settings


def test_starting_vllm_leaves_the_random_state_as_found(started: Started) -> None:
    def draws() -> list[Any]:
        return [random.random(), float(numpy.random.rand()), torch.rand(2).tolist()]

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    expected = draws()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(5)
    engine(Source(tiny_model()), gpu_memory_utilization=0.25)
    assert draws() == expected
    assert started.settings == {"dtype": "float32", "gpu_memory_utilization": 0.25}


def test_vllm_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = VLLMGenerator(max_new_tokens=4, temperature=1.0)
    generator.check()
    monkeypatch.delitem(sys.modules, "vllm")
    message = r"^data\.generator VLLMGenerator needs vLLM: pip install 'sppo-lightning\[vllm\]'$"
    with pytest.raises(UserError, match=message):
        generator.check()


def test_a_platform_without_sleep_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm.platforms"], "current_platform", Platform("cpu"))
    message = (
        r"^data\.generator VLLMGenerator puts vLLM to sleep .* cannot do on this platform \(cpu\): start a"
    )
    with pytest.raises(UserError, match=message):
        VLLMGenerator(max_new_tokens=4, temperature=1.0).check()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    message = (
        r"^VLLMGenerator serves a single process, but this run has 4: set trainer\.devices: 1, or use sppo_"
    )
    with pytest.raises(UserError, match=message):
        engine(Source(tiny_model()))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_memory_out_of_range(share: float) -> None:
    message = rf"^VLLMGenerator\.gpu_memory_utilization={share} must lie in \(0, 1\]$"
    with pytest.raises(ValueError, match=message):
        VLLMGenerator(max_new_tokens=4, temperature=1.0, gpu_memory_utilization=share)


def test_seeds_promise_nothing() -> None:
    assert not VLLMGenerator(max_new_tokens=4, temperature=1.0).reproducible
