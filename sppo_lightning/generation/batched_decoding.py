"""How a model may decode several sequences at once: checked with a few random tokens against its plain forward.

Shapes: P prompts, B rows (active sequences), V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.generation.cache import ReservedLayer, reserved_cache
from sppo_lightning.generation.cache_size import RowBytes, held_bytes
from sppo_lightning.generation.steps import WORTH_SHARING, PlainSteps, left_padded, read, read_prompts
from sppo_lightning.policy.agreement import compare_logits, product_dtype
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.rounding import off_by_a_rounding
from sppo_lightning.system.device_memory import ran_out
from sppo_lightning.types import UserError, first_line

UNLIKE, ALIKE = (3, 9), (6, 6)  # tokens of two prompts
SOURCE = (0, 0, 1)  # prompt of each row
BEFORE, AFTER = 2, 2  # tokens decoded before a row is compacted away, and after
REMOVED = 0

logger = logging.getLogger(__name__)


class Batching(NamedTuple):
    """What sequences of one batch may be, and take."""

    padded: bool  # whether their prompts may differ in length
    row: RowBytes
    shares_prefix: bool = False  # whether what all prompts begin with may be read once


def check_batching(model: nn.Module) -> Batching:
    """Return how a model may decode sequences in a batch: with the log-probs that each would have alone.

    Prompts of one length are all that a model can read together which heeds its padding, or counts it as tokens.

    Args:
        model: a causal language model, in the state that responses are sampled from.

    Raises:
        UserError: if they may not.
    """
    name = type(unwrapped(model)).__name__
    try:
        return Batching(True, _row(model, UNLIKE), _shares_prefix(model))
    except _UnsuitableError as error:
        unlike = error
    try:
        found = Batching(False, _row(model, ALIKE))
    except _UnsuitableError as error:
        raise UserError(
            f"HFGenerator cannot sample from {name} ({error}): use "
            "sppo_lightning.generation.OpenAIServerGenerator with a server that can"
        ) from error
    logger.info("%s reads prompts of one length at a time: where they are padded, %s", name, unlike)
    return found


@torch.inference_mode()
def _shares_prefix(model: nn.Module) -> bool:
    """Whether prompts give the same logits, then and a token later, where what they begin with is read once."""
    config = cast(Any, unwrapped(model)).config
    if not all(isinstance(layer, ReservedLayer) for layer in reserved_cache(config).layers):
        return False  # states, or windows, which count places of the cache
    device, dtype = next(model.parameters()).device, product_dtype(model)
    (first, second), after = _drawn(model, UNLIKE)
    begin = [*second, *first][:WORTH_SHARING]
    prompts = [begin + first, begin + second]
    ids, mask, positions = left_padded(prompts, 1, device)
    width, source = ids.shape[1], torch.arange(len(prompts), device=device)
    tokens, found = torch.tensor([row[0] for row in after[: len(prompts)]], device=device), []
    for shares in (False, True):
        cache = reserved_cache(config)
        logits = read_prompts(model, prompts, ids, mask[:, :width], positions, cache, shares_prefix=shares)
        with PlainSteps(model, cache, source, mask.clone(), width) as steps:
            found.append(torch.stack([logits, steps.logits(tokens, positions[:, -1] + 1)]))
    agreement = compare_logits(*found, dtype=dtype)
    if not agreement.holds:
        logger.info("Each prompt is read whole: what they share would give other log-probs, by %s", agreement)
    return agreement.holds


class _UnsuitableError(Exception):
    """Sequences of a batch are not what each would be alone."""


@torch.inference_mode()
def _row(model: nn.Module, lengths: tuple[int, int]) -> RowBytes:
    """Return what a row takes; raise where prompts of these lengths in a batch give other log-probs than alone."""
    prompts, tokens = _drawn(model, lengths)
    try:
        own = _alone(model, prompts, tokens)
        found, row = _together(model, prompts, tokens)
    except Exception as error:  # of any model's own code
        if ran_out(error):
            raise
        raise _UnsuitableError(first_line(error) or type(error).__name__) from error
    dtype = product_dtype(model)
    there = torch.ones_like(found[..., 0], dtype=torch.bool)
    there[REMOVED, BEFORE + 1 :] = False
    agreement = compare_logits(own[there], found[there], dtype=dtype)
    if not agreement.holds:
        with off_by_a_rounding(unwrapped(model), dtype):  # many layers make more of it
            nudged = _alone(model, prompts, tokens)
        agreement = agreement.allowing(compare_logits(own[there], nudged[there], dtype=dtype).drift)
    if not agreement.holds:
        raise _UnsuitableError(f"batched decoding gives other log-probs, by {agreement}")
    return row


def _drawn(model: nn.Module, lengths: tuple[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each prompt, and of each row after its prompt."""
    vocabulary = cast(Any, unwrapped(model)).config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return drawn

    return [tokens(length) for length in lengths], [tokens(BEFORE + AFTER) for _ in SOURCE]


def _alone(model: nn.Module, prompts: list[list[int]], tokens: list[list[int]]) -> Tensor:
    """Return the logits after each prompt and each later token, rows read one by one, ``[B, tokens + 1, V]``."""
    device = next(model.parameters()).device
    rows = []
    for source, after in zip(SOURCE, tokens, strict=True):
        ids = torch.tensor([prompts[source] + after], device=device)
        logits: Tensor = cast(Any, model)(input_ids=ids, use_cache=False).logits
        rows.append(logits[0, len(prompts[source]) - 1 :])
    return torch.stack(rows).float()


def _together(model: nn.Module, prompts: list[list[int]], tokens: list[list[int]]) -> tuple[Tensor, RowBytes]:
    """Return what :func:`_alone` does of rows in a batch, NaN where one was compacted away; and what a row takes."""
    device = next(model.parameters()).device
    ids, mask, positions = left_padded(prompts, len(tokens[0]), device)
    cache, width = reserved_cache(cast(Any, unwrapped(model)).config), ids.shape[1]
    logits = read(model, ids, mask[:, :width], positions, cache)
    as_read = held_bytes(cache) // len(prompts)
    source, after = torch.tensor(SOURCE, device=device), torch.tensor(tokens, device=device)
    found = logits.new_full((len(tokens), len(tokens[0]) + 1, logits.shape[-1]), float("nan"))
    found[:, 0] = logits[source]
    rows = torch.arange(len(tokens), device=device)
    with PlainSteps(model, cache, source, mask, width) as steps:
        for step in range(len(tokens[0])):
            if step == BEFORE:
                kept = (rows != REMOVED).nonzero().flatten()
                steps.keep(kept)
                rows = rows[kept]
            found[rows, step + 1] = steps.logits(after[rows, step], positions[source[rows], -1] + 1 + step)
    token = (held_bytes(cache) // len(rows) - as_read) // len(tokens[0])
    return found, RowBytes(max(1, token), max(0, as_read - token * width))
