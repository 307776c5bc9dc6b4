"""Does an engine answer as the policy itself would: its greedy answers against the policy's plain forward.

Shapes: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.policy.agreement import compare_logps, distance, product_dtype
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.rounding import off_by_a_rounding
from sppo_lightning.types import UserError, first_line

PROBE_LENGTHS = (2, 7, 30, 250)  # tokens of the probe prompts; the last answer grows over a page of 256
PROBE_TOKENS = 16  # tokens of each answer


class ParityError(UserError):
    """The engine does not reproduce the policy, or cannot run it at all."""


class ProbeAnswer(NamedTuple):
    """An engine's greedy answer to a probe prompt."""

    tokens: Sequence[int]
    logps: Sequence[float] | None  # of each token, nats; None where the engine does not say


def probe_prompts(vocabulary: int, longest: int) -> list[tuple[int, ...]]:
    """Return the same prompts for the same arguments, one of each of ``PROBE_LENGTHS``.

    Args:
        vocabulary: number of token ids to draw from.
        longest: most tokens of prompt and answer together; longer prompts are cut.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(vocabulary, (length,), generator=generator) for length in PROBE_LENGTHS]
    return [tuple(prompt[: max(1, longest - PROBE_TOKENS)].tolist()) for prompt in drawn]


def logit_gaps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return how far each token's logit lies below the best one, ``[T]``.

    Args:
        logits: ``[T, V]``.
        tokens: ``[T]`` token ids.
    """
    return logits.amax(-1) - logits.gather(-1, tokens[:, None]).squeeze(-1)


def gap_tolerance(logits: Tensor, eps: float) -> Tensor:
    """Return how far below the best logit a greedy token may lie by rounding alone, ``[T]``.

    Two kernels round differently, so that of two tokens with logits closer than that, either may be picked:
    four roundings of the largest logit, at least 1e-3. It is no mean over tokens, as an agreement is, but holds for
    each of them: the one token that is worst may lie four times as far off as all do on average.

    Args:
        logits: ``[T, V]``.
        eps: spacing of 1 in the dtype that the policy computes in.
    """
    return (4 * eps * logits.abs().amax(-1)).clamp(min=1e-3)


def check_parity(
    model: nn.Module,
    answer: Callable[[Sequence[tuple[int, ...]]], Sequence[ProbeAnswer]],
    *,
    engine: str,
    vocabulary: int,
    longest: int | None = None,
) -> None:
    """Refuse an engine that does not reproduce the model's plain forward.

    Its greedy tokens must be the forward's, near-ties excepted; its log-probs must be the forward's on average, since
    attention may be wrong by more than rounding and the best token still come out best.

    Args:
        model: the policy as it is sampled from.
        answer: the engine: prompts in, greedy answers of ``PROBE_TOKENS`` tokens out.
        engine: its name, for the error.
        vocabulary: number of token ids to draw the prompts from.
        longest: most tokens of prompt and answer together that the engine takes; ``None``: as many as the model.

    Raises:
        ParityError: if tokens or log-probs lie further off than rounding explains, or the engine fails.
    """
    context = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None)
    prompts = probe_prompts(vocabulary, min(longest or sys.maxsize, context or sys.maxsize))
    subject = _subject(model)
    advice = "use sppo_lightning.generation.HFGenerator"
    try:
        answers = answer(prompts)
    except Exception as error:
        raise ParityError(f"{engine} cannot run {subject} ({first_line(error)}): {advice}") from error

    reason = disagreement(model, prompts, answers, dtype=product_dtype(model))
    if reason is not None:
        raise ParityError(f"{engine} does not reproduce {subject}: {reason}: {advice}")


def disagreement(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[ProbeAnswer],
    *,
    dtype: torch.dtype,
    rounded_weights: bool = False,
) -> str | None:
    """Return how greedy answers differ from the model's plain forward by more than rounding, or ``None``.

    Args:
        model: the policy.
        prompts: that were answered.
        answers: one for each, of at least one token.
        dtype: the coarsest that the answers may have been computed in.
        rounded_weights: whether the engine may hold weights in ``dtype`` that the model holds in more bits.
    """

    def plain_logits() -> Tensor:
        each = zip(prompts, answers, strict=True)
        return torch.cat([answer_logits(model, prompt, one.tokens) for prompt, one in each])

    logits = plain_logits()
    picked = torch.cat([torch.tensor(one.tokens) for one in answers])
    gaps, allowed = logit_gaps(logits, picked), gap_tolerance(logits, torch.finfo(dtype).eps)
    if not bool((gaps <= allowed).all()):
        worst = (gaps - allowed).nan_to_num(nan=float("inf")).argmax()
        return (
            f"a greedy token lies {gaps[worst]:.2g} below the best logit of the plain forward (tolerance "
            f"{allowed[worst]:.2g})"
        )
    said = torch.cat([torch.tensor(one.logps or [math.nan] * len(one.tokens)) for one in answers])
    told = torch.cat([torch.full((len(one.tokens),), one.logps is not None) for one in answers])
    if not bool(told.any()):
        return None
    own = token_logps(logits, picked)
    agreement = compare_logps(own[told], said[told], best_logits=logits.amax(-1)[told], dtype=dtype)
    if not agreement.holds:
        with off_by_a_rounding(unwrapped(model), dtype):
            agreement = agreement.allowing(distance(own, token_logps(plain_logits(), picked)))
    if not agreement.holds and rounded_weights:
        # an autocast rounds weights and inputs of every product; another engine rounds as much, but otherwise
        with torch.autocast(next(model.parameters()).device.type, dtype):
            agreement = agreement.allowing(2 * distance(own, token_logps(plain_logits(), picked)))
    if not agreement.holds:
        return (
            f"its log-probs lie {agreement.drift:.2g} nat per token off those of the plain forward (tolerance "
            f"{agreement.tolerance:.2g})"
        )
    return None


@torch.no_grad()
def answer_logits(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the logits that predict each token of the answer, ``[T, V]`` float32, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1)
    logits: Tensor = output.logits[0, :-1]
    return logits.float().cpu()


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return each token's log-prob, ``[T]``, nats.

    Args:
        logits: ``[T, V]``.
        tokens: ``[T]`` token ids.
    """
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def _subject(model: Any) -> str:
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return "the policy"
    method = getattr(quantization, "quant_method", "unknown method")
    return f"the policy's quantised weights ({getattr(method, 'value', method)})"
