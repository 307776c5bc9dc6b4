"""The current policy at one or several servers, which sample with real tiny models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.model_server import ModelServer
from support.servers import Answer, Request, serving, unused_port
from support.tiny import Source, new_model, random_tokens
from transformers import PreTrainedModel

from sppo_lightning.generation import HFGenerator, SampleRequest
from sppo_lightning.generation.parity import ParityError
from sppo_lightning.generation.server import OpenAIServerGenerator
from sppo_lightning.generation.weight_sync import OffPolicy, VLLMAdapter
from sppo_lightning.system import server_pool
from sppo_lightning.types import Response, UserError

LONGEST = 6
GREEDY = [SampleRequest(prompt, ()) for prompt in random_tokens(3, 9, 20)]
SAMPLED = [SampleRequest(prompt, (7, 8, 9, 10)) for prompt in random_tokens(3, 9, 20, 5)]


@dataclass
class Policy(Source):
    """A policy whose adapter is a whole model beside a note that makes it look like one."""

    model: PreTrainedModel = field(default_factory=new_model)
    sharded: bool = False

    def resident_model(self) -> torch.nn.Module | None:
        return None if self.sharded else super().resident_model()

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        (folder / "adapter_config.json").write_text("{}")

    def train(self) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


def model_server(**settings: Any) -> ModelServer:
    return ModelServer(new_model().eval(), read_weights, **settings)


def read_weights(folder: Path) -> PreTrainedModel:
    model = new_model().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def generator_of(folder: Path, *urls: str, **settings: Any) -> OpenAIServerGenerator:
    defaults: dict[str, Any] = {
        "weight_sync": VLLMAdapter(str(folder)),
        "max_new_tokens": LONGEST,
        "temperature": 1.0,
        "max_concurrency": 2,
        "max_retries": 1,
        "startup_timeout": 20,
    }
    return OpenAIServerGenerator(list(urls), **{**defaults, **settings})


def ordered(answers: Iterator[Any]) -> list[list[Response]]:
    return [one.responses for one in sorted(answers, key=lambda one: one.request)]


def in_process(policy: Policy, requests: Sequence[SampleRequest], **settings: Any) -> list[list[Response]]:
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    return ordered(generator.generate(requests))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server_pool, "LOOK_EVERY", 0.02)


# ------------------------------------------------------------------ on-policy


def test_a_server_answers_with_the_policy_of_each_phase(tmp_path: Path) -> None:
    policy = Policy()
    with serving(model_server()) as local:
        generator = generator_of(tmp_path, local.url)
        for _ in range(2):
            generator.load(policy)
            assert ordered(generator.generate(GREEDY)) == in_process(policy, GREEDY)
            generator.unload()
            policy.train()


def test_an_adapter_that_is_not_applied_is_named_before_anything_is_sampled(tmp_path: Path) -> None:
    policy, server = Policy(), model_server()
    policy.train()
    server.load = lambda path: server.base
    with serving(server) as local:
        generator = generator_of(tmp_path, local.url)
        name = f"policy-{policy.fingerprint()}"
        message = rf"base_url='{local.url}' does not sample from the current policy \('{name}'\)"
        with pytest.raises(ParityError, match=message):
            generator.load(policy)
    assert server.sampled == []


def test_one_stale_server_among_several_is_named(tmp_path: Path) -> None:
    policy, good, stale = Policy(), model_server(), model_server()
    with serving(good) as one, serving(stale) as other:
        generator = generator_of(tmp_path, one.url, other.url)
        generator.load(policy)
        generator.unload()
        policy.train()
        before = copy.deepcopy(stale.base)
        stale.load = lambda path: before
        with pytest.raises(
            ParityError, match=rf"base_url='{other.url}' does not sample from the current policy"
        ):
            generator.load(policy)


def test_off_policy_samples_and_sharded_weights_are_not_checked(tmp_path: Path) -> None:
    policy, server = Policy(), model_server()
    policy.train()
    with serving(server) as local:
        generator = generator_of(tmp_path, local.url, weight_sync=OffPolicy(), model="base")
        with pytest.warns(UserWarning, match="off-policy"):
            generator.load(policy)
        assert len(ordered(generator.generate(GREEDY))) == len(GREEDY)
        server.load = lambda path: server.base
        generator_of(tmp_path, local.url).load(Policy(policy.model, sharded=True))


# ------------------------------------------------------------- several servers


def test_which_server_answers_changes_no_response(tmp_path: Path) -> None:
    policy = Policy()
    with serving(model_server()) as one, serving(model_server()) as other:
        both = generator_of(tmp_path, one.url, other.url)
        both.load(policy)
        found = ordered(both.generate(SAMPLED))
        both.unload()
        alone = generator_of(tmp_path, one.url)
        alone.load(policy)
        assert ordered(alone.generate(SAMPLED)) == found
        alone.unload()
    counts = [sum("seed" in (request.body or {}) for request in server.requests) for server in (one, other)]
    assert min(counts) > 0
    assert sum(counts) == 32  # 16 with both, 16 alone


def test_a_kill_in_mid_phase_changes_no_response(tmp_path: Path) -> None:
    """The killed server is started again without adapters, gets the policy's and goes on."""
    policy, port = Policy(), unused_port()
    first, again = model_server(), model_server()
    many = [SampleRequest(prompt, tuple(range(6))) for prompt in random_tokens(*range(3, 15))]
    with serving(model_server()) as alone:
        generator = generator_of(tmp_path, alone.url)
        generator.load(policy)
        expected = ordered(generator.generate(many))
        generator.unload()
    with ExitStack() as later, serving(model_server()) as other, ExitStack() as doomed:
        generator = generator_of(tmp_path, doomed.enter_context(serving(first, port=port)).url, other.url)
        generator.load(policy)
        found = []
        for one in generator.generate(many):
            found.append(one)
            if len(found) == 2:
                doomed.close()
                later.enter_context(serving(again, port=port))
        generator.unload()
    assert ordered(iter(found)) == expected
    assert first.sampled
    assert again.sampled
    assert list(again.adapters) == [f"policy-{policy.fingerprint()}"]


def test_one_server_that_is_killed_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, port = Policy(), unused_port()
    with ExitStack() as later, ExitStack() as doomed:
        generator = generator_of(tmp_path, doomed.enter_context(serving(model_server(), port=port)).url)
        generator.load(policy)
        answers = generator.generate(GREEDY * 3)
        found = [next(answers)]
        doomed.close()
        later.enter_context(serving(model_server(), port=port))
        found += answers
        generator.unload()
    assert ordered(iter(found)) == in_process(policy, GREEDY * 3)


# ---------------------------------------------------------------------- limits


def test_a_server_that_would_cut_responses_short_is_refused(tmp_path: Path) -> None:
    policy, server = Policy(), model_server(limit=24)
    with serving(server) as local:
        generator = generator_of(tmp_path, local.url)
        assert generator.total_limit() == 24
        generator.load(policy)
        message = (
            r"a server takes 24 tokens of prompt and response together, but a prompt of 20 with 6 new ones needs 26: "
            r"start it with more \(vLLM: --max-model-len 26\), or set max_total_tokens: 24$"
        )
        with pytest.raises(UserError, match=message):
            ordered(generator.generate(GREEDY))
        generator.unload()


def test_max_total_tokens_cuts_as_it_does_in_the_process(tmp_path: Path) -> None:
    policy = Policy()
    requests = [*GREEDY, SampleRequest(random_tokens(30)[0], ())]
    with serving(model_server(limit=24)) as local:
        generator = generator_of(tmp_path, local.url, max_total_tokens=24)
        generator.load(policy)
        *found, dropped = ordered(generator.generate(requests))
        generator.unload()
    assert found == in_process(policy, GREEDY, max_total_tokens=24)
    assert dropped == [Response((), "", "failed", drop_reason="prompt_too_long")]


def test_a_server_that_does_not_say_what_it_takes(tmp_path: Path) -> None:
    def listing(request: Request) -> Answer:
        return Answer(200, {"data": [{"id": "base"}, {"id": "x", "max_model_len": "many"}]})

    with serving(listing) as local:
        assert generator_of(tmp_path, local.url).total_limit() is None


# ------------------------------------------------------------ permanent refusals


@pytest.mark.parametrize(
    ("status", "said"),
    [(500, "LoRA rank 64 is greater than max_lora_rank 16."), (404, "No adapter found"), (400, "bad")],
)
def test_what_a_server_refuses_once_is_not_asked_again(status: int, said: str, tmp_path: Path) -> None:
    server = model_server()

    def respond(request: Request) -> Answer:
        if request.path.endswith("load_lora_adapter"):
            return Answer(status, {"error": {"message": said}})
        return server(request)

    with serving(respond) as local:
        generator = generator_of(tmp_path, local.url, max_retries=5)
        with pytest.raises(UserError, match=rf"does not take the adapter .*{said}.* --max-lora-rank"):
            generator.load(Policy())
    assert sum(request.path.endswith("load_lora_adapter") for request in local.requests) == 1


def test_an_adapter_with_dora_is_not_sent(tmp_path: Path) -> None:
    class DoRAPolicy(Policy):
        def export(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "adapter_config.json").write_text('{"use_dora": true}')

    message = r"vLLM serves no adapter with DoRA: set model\.policy\.lora\.dora: false"
    with serving(model_server()) as local, pytest.raises(UserError, match=message):
        generator_of(tmp_path, local.url).load(DoRAPolicy())
    assert not any(request.path.endswith("load_lora_adapter") for request in local.requests)


def test_a_wrong_model_name_is_named_at_once(tmp_path: Path) -> None:
    with serving(model_server()) as local:
        generator = generator_of(tmp_path, local.url, weight_sync=OffPolicy(), model="bsae", max_retries=5)
        with pytest.warns(UserWarning, match="off-policy"):
            generator.load(Policy())
        with pytest.raises(
            UserError, match=r"knows no such address or model \(404 The model `bsae` does not exist"
        ):
            ordered(generator.generate(GREEDY))
        generator.unload()


@pytest.mark.parametrize("tolerance", [0.0, -1.0])
def test_a_tolerance_that_makes_no_sense(tolerance: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logp_tolerance=.* must be greater than 0 nats"):
        generator_of(tmp_path, "http://localhost:1/v1", logp_tolerance=tolerance)
