"""Whether a forward gives the model's own log-probs: checked with a few random tokens before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from sppo_lightning.pair_forward.layouts import PairLayout, PairRows
from sppo_lightning.policy.agreement import compare_logps, distance, product_dtype
from sppo_lightning.policy.anatomy import unwrapped, window_of
from sppo_lightning.policy.rounding import off_by_a_rounding
from sppo_lightning.policy.sharding import recover
from sppo_lightning.system.device_memory import ran_out
from sppo_lightning.types import first_line

EXACT = (torch.float64, torch.float32)  # in which a model's own roundings are far below the least tolerance
PROMPTS, RESPONSES = (11, 4), ((5, 9), (8, 2))  # tokens of the two probe pairs
OVER_WINDOW = 8  # tokens by which the longest sequence read is longer than a window


class Checked(Protocol):
    """A forward whose parity with a model is checked; see :class:`~sppo_lightning.pair_forward.PairForward`."""

    half_only: ClassVar[bool]
    failing: ClassVar[str]
    differing: ClassVar[str]

    def layout(self, pad_token_id: int, /) -> PairLayout:
        """Return the layout that batches must have."""

    def token_logps(self, model: nn.Module, rows: PairRows, /) -> Tensor:
        """Return the log-prob of each response token."""

    def release(self, model: nn.Module, /) -> None:
        """Remove the attention override and compiled layers."""


class ParityCheck(NamedTuple):
    """Settings of a forward's parity check at a run's start."""

    longest: int  # most tokens of prompt and response together
    precision: Callable[[], AbstractContextManager[Any]]  # the trainer's
    agree: Callable[[bool], bool]  # whether it is true on all processes


def parity_failure(forward: Checked, model: nn.Module, check: ParityCheck) -> str | None:
    """Return why a forward does not give the model's own log-probs; ``None`` if it does."""
    inner, device = unwrapped(model), next(model.parameters()).device
    name = type(inner).__name__
    context, dtype = _precision(forward, model, check)
    prompts, chosen, rejected = probe_pairs(
        inner.config.get_text_config().vocab_size, window_of(model) or 0, check.longest
    )
    rows = move_data_to_device(forward.layout(0).rows(prompts, chosen, rejected), device)
    with torch.no_grad(), context:
        try:
            found = forward.token_logps(model, rows)
        except Exception as error:
            if ran_out(error):
                raise
            recover(model)
            return f"{name} {forward.failing} ({first_line(error)})"
        finally:
            forward.release(model)
        pairs = zip([*prompts, *prompts], [*chosen, *rejected], strict=True)
        sequences = [(torch.tensor([*p, *r], device=device), len(r)) for p, r in pairs]
        alone = [_alone(inner, *sequence) for sequence in sequences]
        short = slice(len(prompts) - 1, None, len(prompts))  # the last prompt is never longer than a window
        noise = 0.0 if dtype in EXACT else _noise(inner, sequences[short], alone[short], dtype)
    own, best = (torch.cat(parts) for parts in zip(*alone, strict=True))
    agreement = compare_logps(own, found, best_logits=best, dtype=dtype).allowing(noise)
    return None if agreement.holds else f"{name} {forward.differing}, by {agreement}"


def _precision(
    forward: Checked, model: nn.Module, check: ParityCheck
) -> tuple[AbstractContextManager[Any], torch.dtype]:
    """Return the most exact arithmetic in which weights and kernel can be compared."""
    weights = {parameter.dtype for parameter in model.parameters()}
    if weights <= {torch.float32, torch.float64} and not forward.half_only:
        return nullcontext(), product_dtype(model)
    device = next(model.parameters()).device.type
    with check.precision():
        if torch.is_autocast_enabled(device):
            return check.precision(), torch.get_autocast_dtype(device)
    return check.precision(), torch.float16 if torch.float16 in weights else torch.bfloat16


def _alone(model: nn.Module, ids: Tensor, response: int) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the last ``response`` tokens by the model's own logits, and the best logits there."""
    keep = response + 1  # not every model takes the argument; some swallow it
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": keep} if takes else {}
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **options).logits[0, -keep:-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.log_softmax(-1).gather(-1, ids[-response:, None]).squeeze(-1)
    return logps, logits.abs().amax(-1)


def _noise(
    model: Any,
    sequences: Sequence[tuple[Tensor, int]],
    alone: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> float:
    """Return how far a model's own log-probs move when its embeddings are off by a rounding, nats per token on average.

    Args:
        model: a causal language model.
        sequences: that :func:`_alone` was called with.
        alone: what it returned.
        dtype: of the products.
    """
    with off_by_a_rounding(model, dtype):
        nudged = torch.cat([_alone(model, *sequence)[0] for sequence in sequences])
    return distance(nudged, torch.cat([logps for logps, _ in alone]))


def probe_pairs(
    vocabulary: int, window: int = 0, longest: int = 0
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return prompts, chosen and rejected responses of two pairs of random tokens.

    Args:
        vocabulary: size of it.
        window: of the model's attention, in tokens.
        longest: most tokens of a run's sequences; the pairs are longer than the window if those may be.
    """
    reach = window + OVER_WINDOW if window < longest else 0
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return ids

    prompts = [drawn(max(PROMPTS[0], reach)), drawn(PROMPTS[1])]
    return prompts, [drawn(c) for c, _ in RESPONSES], [drawn(r) for _, r in RESPONSES]
