"""Does an engine answer as the policy itself would: its greedy answers against the policy's plain forward.

Shapes: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.types import UserError, first_line

PROBE_LENGTHS = (2, 7, 30, 250)  # tokens of the probe prompts; the last answer grows over a page of 256
PROBE_TOKENS = 16  # tokens of each answer
TF32_EPS = 2.0**-10


class ParityError(UserError):
    """The engine does not reproduce the policy, or cannot run it at all."""


class ProbeAnswer(NamedTuple):
    """An engine's greedy answer to a probe prompt."""

    tokens: Sequence[int]
    logps: Sequence[float]  # of each token, nats


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
    four roundings of the largest logit, at least 1e-3.

    Args:
        logits: ``[T, V]``.
        eps: spacing of 1 in the dtype that the policy computes in.
    """
    return (4 * eps * logits.abs().amax(-1)).clamp(min=1e-3)


def drift_tolerance(eps: float) -> float:
    """Return how far log-probs may lie apart by rounding alone, nats per token on average.

    0.1 in bfloat16 and 0.0125 in float16, some two and four times what a sound engine shows on a policy of 30
    layers; at least 1e-4.
    """
    return max(1e-4, 12.8 * eps)


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
    eps = rounding(model)
    drifts = []
    for prompt, (tokens, logps) in zip(prompts, answers, strict=True):
        logits = _plain_logits(model, prompt, tokens)
        picked = torch.tensor(tokens)
        gaps, allowed = logit_gaps(logits, picked), gap_tolerance(logits, eps)
        if not bool((gaps <= allowed).all()):
            worst = (gaps - allowed).nan_to_num(nan=float("inf")).argmax()
            raise ParityError(
                f"{engine} does not reproduce {subject}: a greedy token lies {gaps[worst]:.2g} below the best logit "
                f"of the plain forward (tolerance {allowed[worst]:.2g}): {advice}"
            )
        plain = logits.log_softmax(-1).gather(-1, picked[:, None]).squeeze(-1)
        drifts.append((plain - torch.tensor(logps)).abs())
    drift = torch.cat(drifts).mean().item()
    if not drift <= drift_tolerance(eps):
        raise ParityError(
            f"{engine} does not reproduce {subject}: its log-probs lie {drift:.2g} nat per token off those of the "
            f"plain forward (tolerance {drift_tolerance(eps):.2g}): {advice}"
        )


@torch.no_grad()
def _plain_logits(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the logits that predict each token of the answer, ``[T, V]`` float32, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1)
    logits: Tensor = output.logits[0, :-1]
    return logits.float().cpu()


def rounding(model: Any) -> float:
    """Return the spacing of 1 in the coarsest dtype that the model multiplies in."""
    dtypes = {model.dtype}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        dtypes.add(
            quantization.bnb_4bit_compute_dtype
            if getattr(quantization, "load_in_4bit", False)
            else torch.float16  # what bitsandbytes casts the input of 8-bit layers to
        )
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return max(eps, TF32_EPS)
    return eps


def _subject(model: Any) -> str:
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return "the policy"
    method = getattr(quantization, "quant_method", "unknown method")
    return f"the policy's quantised weights ({getattr(method, 'value', method)})"
