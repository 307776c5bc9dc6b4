"""Log-probs of tokens and of responses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sppo_lightning.pair_forward.logprobs import by_response, collision_entropy, token_logps

QUICK = settings(max_examples=50, deadline=None)


def draw(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (rows,), generator=generator)


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0]


def test_token_logps_golden() -> None:
    """Logits ln(1, 2, 5) are probabilities 1/8, 1/4, 5/8; a constant on top changes nothing."""
    logits = torch.tensor([[1.0, 2, 5], [1, 2, 5], [10, 20, 50]]).log()
    expected = torch.tensor([1 / 8, 5 / 8, 1 / 4]).log()
    torch.testing.assert_close(token_logps(logits, torch.tensor([0, 2, 1])), expected)


def test_collision_entropy_golden() -> None:
    """Probabilities 1/8, 1/4, 5/8, whose squares sum to 30/64; one sure token; three that are alike."""
    logits = torch.tensor([[1.0, 2, 5], [0, 1, 0], [7, 7, 7]]).log()
    found = collision_entropy(logits.requires_grad_())
    torch.testing.assert_close(found, -torch.tensor([30 / 64, 1, 1 / 3]).log())
    assert not found.requires_grad


@QUICK
@given(
    rows=st.integers(0, 9), vocabulary=st.integers(1, 12), chunk=st.integers(1, 11), seed=st.integers(0, 99)
)
def test_collision_entropy_is_that_of_the_softmax(rows: int, vocabulary: int, chunk: int, seed: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, _ = draw(rows, vocabulary, dtype, seed)
        found = collision_entropy(logits, chunk=chunk)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        expected = -logits.double().softmax(-1).square().sum(-1).log()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        assert bool((found >= -1e-5).all())


@QUICK
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 12),
    chunk=st.integers(1, 11),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_equals_log_softmax_in_value_and_gradient(
    rows: int, vocabulary: int, chunk: int, seed: int, dtype: torch.dtype
) -> None:
    logits, targets = draw(rows, vocabulary, dtype, seed)
    weights = torch.linspace(-1, 2, rows)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = token_logps(ours, targets, chunk=chunk), naive(theirs, targets)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


@QUICK
@given(rows=st.integers(1, 9), chunk=st.integers(1, 11), seed=st.integers(0, 99))
def test_the_chunk_changes_nothing(rows: int, chunk: int, seed: int) -> None:
    logits, targets = draw(rows, 7, torch.bfloat16, seed)
    results = []
    for size in (chunk, 4096):
        leaf = logits.clone().requires_grad_()
        logps = token_logps(leaf, targets, chunk=size)
        logps.sum().backward()
        assert leaf.grad is not None
        results.append((logps.detach(), leaf.grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_gradcheck(chunk: int) -> None:
    logits, targets = draw(5, 4, torch.float64)

    def logps(leaf: Tensor) -> Tensor:
        return token_logps(leaf, targets, chunk=chunk)

    assert torch.autograd.gradcheck(logps, [logits.requires_grad_()])


def test_bfloat16_logits_give_the_float32_log_probs_of_their_values() -> None:
    """Computed in bfloat16, values near -10 would be off by up to 1/32."""
    logits, targets = draw(64, 300, torch.bfloat16)
    found = token_logps(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive(logits.double(), targets).float(), rtol=0, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    """The tolerance is half the spacing of float32 at 1e4."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(logps, torch.tensor([0.0, -math.log(2)]), rtol=0, atol=5e-4)
    logps.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0, 0], [-0.5, 0.5, 0]]), rtol=0, atol=5e-4)


def test_inputs_are_left_alone() -> None:
    logits, targets = draw(6, 5)
    before = logits.clone()
    token_logps(logits.requires_grad_(), targets, chunk=2).sum().backward()
    assert torch.equal(logits, before)


class LargestFloat32(TorchDispatchMode):
    """Records the most elements of any float32 tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_float32(compute: Any, logits: Tensor, targets: Tensor) -> int:
    leaf = logits.clone().requires_grad_()
    with LargestFloat32() as largest:
        compute(leaf, targets).sum().backward()
    assert leaf.grad is not None
    return largest.elements


def test_float32_logits_exist_for_one_chunk_only() -> None:
    logits, targets = draw(64, 97, torch.bfloat16)
    assert largest_float32(lambda x, y: token_logps(x, y, chunk=4), logits, targets) == 4 * 97
    assert largest_float32(naive, logits, targets) == 64 * 97  # the recorder does see them


def test_nothing_but_the_logits_and_one_number_a_position_is_saved() -> None:
    logits, targets = draw(64, 97, torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaf = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logps(leaf, targets)
    large = [tensor for tensor in saved if tensor.numel() > 64]
    assert [tensor.data_ptr() for tensor in large] == [leaf.data_ptr()]


@pytest.mark.parametrize("chunk", [0, -3])
def test_bad_chunk(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"^chunk={chunk} must be at least 1$"):
        token_logps(*draw(2, 3), chunk=chunk)


# -------------------------------------------------------------------- responses


def test_response_sums_golden() -> None:
    """Places 0, 1 and 5 of three responses of up to 3 tokens: -1 - 2 = -3; -4 alone; nothing at all."""
    found = by_response(torch.tensor([-1.0, -2, -4]), torch.tensor([0, 1, 5]), 3, 3).sum(-1)
    assert found.dtype == torch.float64
    assert found.tolist() == [-3, -4, 0]


def test_sums_without_tokens() -> None:
    assert by_response(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2, 0).sum(-1).tolist() == [0, 0]


def test_response_sums_are_float64() -> None:
    """In float32, 2**24 + 1 = 2**24."""
    logps = torch.tensor([-(2.0**24), -1.0, -1.0])
    assert by_response(logps, torch.arange(3), 1, 3).sum(-1).tolist() == [-(2.0**24) - 2]
    exact = torch.tensor([-1 / 3], dtype=torch.float64)
    assert torch.equal(by_response(exact, torch.arange(1), 1, 1).sum(-1), exact)


def test_each_token_gets_its_own_gradient() -> None:
    logps = torch.zeros(3, requires_grad=True)
    total = by_response(logps, torch.tensor([4, 0, 1]), 2, 3).sum(-1)
    (total * torch.tensor([2.0, -3.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-3, 2, 2]


@QUICK
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_padding_changes_no_sum(lengths: list[int], padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(sum(lengths), generator=generator)
    longest = max(lengths) + padding
    places = [row * longest + offset for row, length in enumerate(lengths) for offset in range(length)]
    found = by_response(logps, torch.tensor(places, dtype=torch.long), len(lengths), longest).sum(-1)
    expected = torch.stack([part.double().sum() for part in logps.split(lengths)])
    torch.testing.assert_close(found, expected)
