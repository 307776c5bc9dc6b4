"""What a real vLLM samples, beside what the policy itself does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import random_tokens
from support.vllm_policies import LIMIT, RANK, ServedPolicy, adapted, plain
from support.vllm_server import VLLMServer

from sppo_lightning.generation import (
    HFGenerator,
    OpenAIServerGenerator,
    SampleRequest,
    VLLMAdapter,
    VLLMGenerator,
)
from sppo_lightning.generation.parity import ParityError
from sppo_lightning.generation.protocol import PolicySource
from sppo_lightning.generation.weight_sync import WeightSync
from sppo_lightning.system.servers import ServerClient
from sppo_lightning.types import Response, UserError

pytestmark = pytest.mark.vllm

LONGEST = 24
GREEDY = [SampleRequest(prompt, ()) for prompt in random_tokens(3, 9, 20, 1, 60, 33)]
SAMPLED = [SampleRequest(prompt, (7, 8, 2**63 - 1)) for prompt in random_tokens(3, 9, 20)]


class AsServed(WeightSync):
    """The policy is the model that the server was started with."""

    names_model = False

    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        assert model is not None
        return model


def generator_of(
    server: VLLMServer, sync: WeightSync, *others: str, **settings: Any
) -> OpenAIServerGenerator:
    defaults: dict[str, Any] = {
        "max_new_tokens": LONGEST,
        "temperature": 1.0,
        "max_concurrency": 8,
        "startup_timeout": 600,
        "model": None if sync.names_model else str(server.folder),
    }
    return OpenAIServerGenerator([server.url, *others], sync, **{**defaults, **settings})


def ordered(answers: Iterator[Any]) -> list[list[Response]]:
    return [one.responses for one in sorted(answers, key=lambda one: one.request)]


def at_server(
    server: VLLMServer,
    sync: WeightSync,
    policy: ServedPolicy,
    requests: Sequence[SampleRequest],
    **settings: Any,
) -> list[list[Response]]:
    generator = generator_of(server, sync, **settings)
    generator.load(policy)
    try:
        return ordered(generator.generate(requests))
    finally:
        generator.unload()


def in_process(
    policy: ServedPolicy, requests: Sequence[SampleRequest], **settings: Any
) -> list[list[Response]]:
    generator = HFGenerator(**{"max_new_tokens": LONGEST, "temperature": 1.0, **settings})
    generator.load(policy)
    return ordered(generator.generate(requests))


def test_the_base_answers_as_the_policy_does(server: VLLMServer, base: Path) -> None:
    policy = plain(base)
    assert at_server(server, AsServed(), policy, GREEDY) == in_process(policy, GREEDY)


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 1}, {"max_total_tokens": 40}, {"stop": ["a"]}, {"stop": ["e", "\n"]}],
    ids=["one token", "total", "stop", "stops"],
)
def test_limits_and_stop_strings(server: VLLMServer, base: Path, settings: dict[str, Any]) -> None:
    policy = plain(base)
    found = at_server(server, AsServed(), policy, GREEDY, **settings)
    fitting = [place for place, request in enumerate(GREEDY) if len(request.token_ids) < 40]
    expected = in_process(policy, [GREEDY[place] for place in fitting], **settings)
    if "max_total_tokens" in settings:
        assert found[4] == [Response((), "", "failed", drop_reason="prompt_too_long")]
    assert [found[place] for place in fitting] == expected


def test_several_end_tokens(server: VLLMServer, base: Path) -> None:
    free = in_process(plain(base), GREEDY)
    ends = frozenset({1, free[0][0].token_ids[5], free[1][0].token_ids[9]})
    policy = plain(base, end_token_ids=ends)
    found = at_server(server, AsServed(), policy, GREEDY)
    assert found == in_process(policy, GREEDY)
    assert "stop" in {one.finish_reason for (one,) in found}


def test_seeds_decide_in_whatever_order(server: VLLMServer, base: Path) -> None:
    policy = plain(base)
    found = at_server(server, AsServed(), policy, SAMPLED, temperature=0.8, top_p=0.9, top_k=50)
    again = at_server(
        server, AsServed(), policy, SAMPLED[::-1], temperature=0.8, top_p=0.9, top_k=50, max_concurrency=3
    )
    assert again[::-1] == found
    assert len({one.token_ids for responses in found for one in responses}) == 9


def test_an_adapter_is_loaded_anew_each_iteration(server: VLLMServer, base: Path, tmp_path: Path) -> None:
    policy, sync = adapted(base), VLLMAdapter(str(tmp_path))
    generator = generator_of(server, sync)
    answers = []
    for iteration in range(3):
        generator.load(policy)
        answers.append(ordered(generator.generate(GREEDY)))
        generator.unload()
        assert answers[-1] == in_process(policy, GREEDY)
        policy.train(iteration)
    assert answers[0] == in_process(plain(base), GREEDY)  # a fresh adapter changes nothing
    assert answers[0] != answers[1] != answers[2]


# ------------------------------------------------------------------------ faults


def test_a_base_that_is_not_the_policys_is_named(server: VLLMServer, base: Path) -> None:
    policy = plain(base)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.2)
    with pytest.raises(ParityError, match="does not sample from the current policy"):
        generator_of(server, AsServed()).load(policy)


def test_an_adapter_that_has_not_arrived_is_named(server: VLLMServer, base: Path, tmp_path: Path) -> None:
    """The base answers where the adapter should."""

    class Forgetful(WeightSync):
        names_model = False
        hand_over = AsServed.hand_over

    policy = adapted(base)
    generator = generator_of(server, Forgetful())
    generator.load(policy)
    generator.unload()
    policy.train(0, by=0.02)
    with pytest.raises(ParityError, match="stayed as they were"):
        generator.load(policy)


def test_a_rank_above_the_servers_is_named_at_once(server: VLLMServer, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not take the adapter .*rank.* --max-lora-rank"):
        generator_of(server, VLLMAdapter(str(tmp_path))).load(adapted(base, rank=2 * RANK))


def test_a_wrong_name_is_named_at_once(server: VLLMServer, base: Path) -> None:
    with pytest.raises(UserError, match=r"knows no such address or model \(404 .*`bsae` does not exist"):
        generator_of(server, AsServed(), model="bsae").load(plain(base))


def test_a_context_that_is_too_small_is_named(server: VLLMServer, base: Path) -> None:
    generator = generator_of(server, AsServed(), max_new_tokens=LIMIT - 10)
    assert generator.total_limit() == LIMIT
    generator.load(plain(base))
    needed = 20 + LIMIT - 10  # of the first prompt that is too long
    with pytest.raises(UserError, match=rf"takes {LIMIT} tokens .* --max-model-len {needed}\)"):
        ordered(generator.generate(GREEDY))
    generator.unload()


def test_vllm_in_the_process_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"cannot do on this platform \(cpu\)"):
        VLLMGenerator(max_new_tokens=4, temperature=1.0).check()


def test_two_servers_of_which_one_is_killed(
    server: VLLMServer, second: VLLMServer, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = adapted(base)
    policy.train(6)
    sync = VLLMAdapter(str(tmp_path))
    many = [SampleRequest(request.token_ids, (seed,)) for request in SAMPLED for seed in range(8)]
    expected = at_server(server, sync, policy, many)
    generator = generator_of(server, sync, second.url, max_concurrency=4)
    generator.load(policy)
    assert ordered(generator.generate(many)) == expected
    assert caplog.text == ""
    answers = generator.generate(many)
    found = [next(answers), next(answers)]
    second.kill()
    found += answers
    generator.unload()
    assert ordered(iter(found)) == expected
    assert f"{second.url}' cannot be reached" in caplog.text
    assert "left out until it is there" in caplog.text


def test_a_server_that_is_killed_in_mid_phase_and_started_again(
    server: VLLMServer, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last test of the file, since it takes a start of its own."""
    caplog.set_level("INFO")
    policy = adapted(base)
    policy.train(5)
    many = [request for request in GREEDY for _ in range(6)]
    generator = generator_of(server, VLLMAdapter(str(tmp_path)), max_concurrency=4)
    generator.load(policy)
    answers = generator.generate(many)
    found = [next(answers), next(answers)]
    server.kill()
    server.start()
    found += answers
    generator.unload()
    assert ordered(iter(found)) == in_process(policy, many)
    assert "of startup_timeout=600 s" in caplog.text
