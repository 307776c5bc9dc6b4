"""Log-probs of responses from hidden states, a chunk of the vocabulary matrix's products at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.tiny import TRAINED_CONFIGS, VOCABULARY, new_model, random_tokens
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward, VarlenForward
from sppo_lightning.pair_forward import head as response_head
from sppo_lightning.pair_forward.head import read_tokens

# scaled or capped logits, more in a decoder's output, a decoder inside the decoder or under another name
HEADS = [
    *("llama", "gemma3_capped", "gemma2", "granite", "cohere", "cohere2", "qwen3_moe"),
    *("gpt2", "gemma4", "opt", "llama4"),
]
TOKENS = 7
TARGETS = torch.tensor(random_tokens(TOKENS, seed=5)[0])


def response_logps(model: Any, hidden: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    return read_tokens(model, hidden, targets, chunk=chunk).logps


def states_of(model: Any) -> tuple[Tensor, Tensor]:
    """Hidden states behind the last norm, ``[N, H]``, and the model's own logits for them, ``[N, V]``."""
    ids = torch.tensor(random_tokens(TOKENS))
    output = model.eval()(input_ids=ids, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0].detach(), output.logits[0].detach()


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def with_gradients(model: nn.Module, hidden: Tensor, chunk: int | None) -> list[Tensor]:
    """Log-probs, and the gradients of a weighted sum for the states and for the head's weights."""
    model.zero_grad()
    leaf = hidden.clone().requires_grad_()
    logps = response_logps(model, leaf, TARGETS, chunk=chunk)
    (logps * torch.linspace(-1, 2, TOKENS).to(logps.dtype)).sum().backward()
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    assert leaf.grad is not None
    return [logps.detach(), leaf.grad, head.grad]


def head_calls(model: Any) -> list[int]:
    """Return a list that will hold the positions of each call of the model's head."""
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: calls.append(args[0].shape[-2]))
    return calls


# --------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", HEADS)
def test_the_models_own_transform_of_logits_is_applied(kind: str) -> None:
    model = new_model(kind)
    hidden, logits = states_of(model)
    found = response_logps(model, hidden, TARGETS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(logits, TARGETS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_entropy_is_that_of_the_models_own_logits(kind: str, chunk: int | None) -> None:
    model = new_model(kind)
    hidden, logits = states_of(model)
    leaf = hidden.clone().requires_grad_()
    found = read_tokens(model, leaf, TARGETS, chunk=chunk, with_entropy=True)
    assert found.collision_entropy is not None
    assert not found.collision_entropy.requires_grad
    expected = -logits.double().softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(found.collision_entropy.double(), expected, rtol=0, atol=1e-5)
    (found.logps.sum() + found.collision_entropy.sum()).backward()
    without, expected_gradient = (
        response_logps(model, hidden.requires_grad_(), TARGETS, chunk=chunk),
        leaf.grad,
    )
    without.sum().backward()
    assert torch.equal(found.logps, without)
    assert hidden.grad is not None
    assert expected_gradient is not None
    assert torch.equal(hidden.grad, expected_gradient)


@pytest.mark.parametrize("kind", ["gemma3_capped", "granite", "cohere"])
def test_the_transform_would_be_missed(kind: str) -> None:
    """The product with the head's weights alone gives other log-probs by far."""
    model = new_model(kind)
    hidden, logits = states_of(model)
    bare = hidden @ model.get_output_embeddings().weight.detach().T
    assert float((naive(bare, TARGETS) - naive(logits, TARGETS)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma3_capped"])
def test_the_chunk_changes_nothing(kind: str) -> None:
    model = new_model(kind, torch.float64)
    hidden, logits = states_of(model)
    expected = with_gradients(model, hidden, None)
    torch.testing.assert_close(expected[0], naive(logits, TARGETS), rtol=0, atol=1e-12)
    for chunk in (1, 2, TOKENS - 1, TOKENS, TOKENS + 1, 10**9):
        for found, own in zip(with_gradients(model, hidden, chunk), expected, strict=True):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, own, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_models_own_logits() -> None:
    model: Any = new_model("granite", torch.float64)
    hidden, _ = states_of(model)
    found = with_gradients(model, hidden, 2)
    leaf, head = hidden.clone().requires_grad_(), model.lm_head.weight
    logps = naive((leaf @ head.T) / TRAINED_CONFIGS["granite"].logits_scaling, TARGETS)
    expected = torch.autograd.grad((logps * torch.linspace(-1, 2, TOKENS)).sum(), [leaf, head])
    for ours, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
def test_autocast_holds_in_every_chunk_and_when_it_is_recomputed(chunk: int) -> None:
    """The product is taken in bfloat16, what follows in float32."""
    model = new_model()
    hidden, _ = states_of(model)
    weight = model.get_output_embeddings().weight
    expected = naive((hidden.bfloat16() @ weight.bfloat16().T).float(), TARGETS)
    dtypes: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = response_logps(model, leaf, TARGETS, chunk=chunk)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 2 * -(-TOKENS // chunk) - 1
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=1e-5)


def test_no_tokens_at_all() -> None:
    model = new_model()
    hidden = torch.zeros(0, 32, requires_grad=True)
    logps = response_logps(model, hidden, TARGETS[:0])
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None


# --------------------------------------------------------------------- chunks


def test_all_chunks_but_the_last_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions, two at once: 2 + 2 + 2 + 1, then the first three again; without gradients, no more."""
    monkeypatch.setitem(response_head.CHUNK_LOGITS, "cpu", 2 * VOCABULARY + 1)
    model = new_model()
    hidden, _ = states_of(model)
    calls = head_calls(model)
    logps = response_logps(model, hidden, TARGETS)
    assert calls == [2, 2, 2, 1]
    logps.sum().backward()
    assert sorted(calls) == [1, 2, 2, 2, 2, 2, 2]
    calls.clear()
    with torch.no_grad():
        response_logps(model, hidden, TARGETS)
    assert calls == [2, 2, 2, 1]


def test_a_vocabulary_over_the_limit_still_gets_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(response_head.CHUNK_LOGITS, "cpu", 10)
    model = new_model()
    hidden, _ = states_of(model)
    calls = head_calls(model)
    response_logps(model, hidden, TARGETS)
    assert calls == [1] * TOKENS


@pytest.mark.parametrize("forward", [PlainForward, SharedForward, VarlenForward, AutoForward])
@pytest.mark.parametrize("chunk", [0, -2])
def test_bad_chunk(forward: type[PairForward], chunk: int) -> None:
    with pytest.raises(ValueError, match=rf"^{forward.__name__}\.chunk={chunk} must be at least 1$"):
        forward(chunk=chunk)


# ------------------------------------------------------- the decoder's own forward


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "llama4"])
def test_the_decoder_runs_again_afterwards(kind: str) -> None:
    model = new_model(kind)
    hidden, logits = states_of(model)
    response_logps(model, hidden, TARGETS, chunk=2).sum().backward()
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(states_of(model)[1], logits)


def test_the_decoder_runs_again_after_an_error() -> None:
    model = new_model()
    hidden, logits = states_of(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("no head today")

    hook = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no head today"):
        response_logps(model, hidden, TARGETS)
    hook.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(states_of(model)[1], logits)


def test_a_forward_that_was_set_on_the_decoder_stays() -> None:
    """As libraries do that move weights on demand or count calls."""
    model: Any = new_model()
    own, calls = model.model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.model.forward = counted
    hidden, _ = states_of(model)
    response_logps(model, hidden, TARGETS)
    assert calls == [1]  # not for the head
    states_of(model)
    assert calls == [1, 1]


# --------------------------------------------------------------------- memory


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes that lived at once of what ``compute`` allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def all_at_once(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return model.lm_head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]  # type: ignore[no-any-return]


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """1024 tokens, 8192 and 32768 entries: float32 logits grow by 96 MiB, those of a chunk by 1.5 MiB.

    The gradient of the head's weights grows by 1.5 MiB too.
    """
    tokens, small, large = 1024, 8192, 32768
    targets = torch.arange(tokens)
    hidden = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    growth = {}
    computations: dict[str, Callable[..., Tensor]] = {
        "chunks": lambda *given: response_logps(*given, chunk=16),
        "at once": all_at_once,
    }
    for name, compute in computations.items():
        peaks = []
        for vocabulary in (small, large):
            config = tiny_config(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1)
            model = LlamaForCausalLM(config)
            leaf = hidden.clone().requires_grad_()
            peaks.append(peak_bytes(lambda: compute(model, leaf, targets).sum().backward()))  # noqa: B023
        growth[name] = peaks[1] - peaks[0]
    logits = tokens * (large - small) * 4
    assert growth["chunks"] < 0.15 * logits
    assert growth["at once"] > logits  # which shows that the measurement sees them
