r"""How much arithmetic an optimizer step takes, and how fast this machine multiplies the model's matrices.

Notation: N weights of the linear layers inside the decoder (no embeddings, no norms, no head), L layers, H hidden
width, V vocabulary, :math:`H_q` query heads of D numbers; a pair has a prompt of P tokens and responses of C and R.
One multiply-add is two operations.

- Linear layers: forward 2N a token, gradient of the input 2N, gradient of the weight 2N: 6N, or 4N where the weights
  are frozen under an adapter. The adapter's own products (under 1 % at rank 16) are left out.
- Head: 6HV a scored position, or 4HV where it is frozen; the C + R positions that predict response tokens.
- Attention: a query and a key meet in 2D operations for the score and 2D for the value, in each head and layer, and
  twice that in the backward pass: :math:`12 L H_q D` for each pair of a query and a key that it may see.
- Tokens and query-key pairs, with the prompt shared: P + C + R and
  :math:`t(P) + PC + t(C) + PR + t(R)` with :math:`t(n) = n(n+1)/2`; each response with its own prompt:
  2P + C + R and :math:`t(P+C) + t(P+R)`.

What gradient checkpointing computes a second time is not counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from workload import TokenPair

LinearShape = tuple[int, int]  # inputs, outputs


class Architecture(NamedTuple):
    """What counts of a causal language model."""

    linears: Counter[LinearShape]  # of the decoder, with how often they occur
    head: LinearShape
    layers: int
    query_width: int  # query heads times their width

    @property
    def body_weights(self) -> int:
        """N: weights of the linear layers inside the decoder."""
        return sum(count * inputs * outputs for (inputs, outputs), count in self.linears.items())


class Work(NamedTuple):
    """Floating-point operations of one optimizer step."""

    linear: float
    head: float
    attention: float

    @property
    def products(self) -> float:
        """Operations of the products with weights."""
        return self.linear + self.head


def architecture(config: Any) -> Architecture:
    """Read a transformers config, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = Counter(
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        linears,
        (head.in_features, head.out_features),
        config.num_hidden_layers,
        config.num_attention_heads * width,
    )


def step_work(model: Architecture, pairs: Sequence[TokenPair], *, shared: bool, frozen: bool) -> Work:
    """Return the operations of one step; the formulas stand above.

    Args:
        model: the model.
        pairs: of the step.
        shared: whether a prompt is read once for both responses.
        frozen: whether the weights are frozen under an adapter.
    """
    per_weight = 4 if frozen else 6
    tokens = meetings = scored = 0
    for pair in pairs:
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        scored += c + r
        if shared:
            tokens += p + c + r
            meetings += _triangle(p) + p * (c + r) + _triangle(c) + _triangle(r)
        else:
            tokens += 2 * p + c + r
            meetings += _triangle(p + c) + _triangle(p + r)
    return Work(
        linear=per_weight * model.body_weights * tokens,
        head=per_weight * model.head[0] * model.head[1] * scored,
        attention=12 * model.layers * model.query_width * meetings,
    )


def _triangle(tokens: int) -> float:
    return tokens * (tokens + 1) / 2


class Products:
    """Times the products of a step with each of the model's weight shapes.

    Args:
        model: the model.
        tokens: that go through the decoder.
        scored: positions that go through the head.
        frozen: whether the weights are frozen, so that they need no gradient.
        dtype: of the products.
        device: where they are taken.
    """

    def __init__(
        self,
        model: Architecture,
        *,
        tokens: int,
        scored: int,
        frozen: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shapes = [(shape, tokens, count) for shape, count in model.linears.items()]
        self._shapes.append((model.head, scored, 1))
        self._frozen = frozen
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._repeats = 10 if device.type == "cuda" else 1

    def measure(self) -> tuple[float, float]:
        """Return operations and seconds of all products of one step, each shape weighted by how often it occurs."""
        operations = seconds = 0.0
        for (inputs, outputs), rows, count in self._shapes:
            x = torch.randn(rows, inputs, **self._options)
            weight = torch.randn(outputs, inputs, **self._options)
            gradient = torch.randn(rows, outputs, **self._options)
            products = self._products(x, weight, gradient)
            seconds += count * sum(map(self._seconds, products))
            operations += count * len(products) * 2.0 * rows * inputs * outputs
        return operations, seconds

    def _products(self, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Callable[[], Tensor]]:
        needed = [lambda: x @ weight.T, lambda: gradient @ weight]
        return needed if self._frozen else [*needed, lambda: gradient.T @ x]

    def _seconds(self, product: Callable[[], Tensor]) -> float:
        product()  # the first call plans the kernel
        self._synchronise()
        start = time.perf_counter()
        for _ in range(self._repeats):
            product()
        self._synchronise()
        return (time.perf_counter() - start) / self._repeats

    def _synchronise(self) -> None:
        if self._options["device"].type == "cuda":
            torch.cuda.synchronize()
