"""Does a server sample from the current policy: its greedy answers before each phase, against the policy's own forward.

Shapes: T tokens of an answer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sppo_lightning.generation.parity import (
    PROBE_TOKENS,
    ParityError,
    ProbeAnswer,
    answer_logits,
    disagreement,
    token_logps,
)
from sppo_lightning.policy.agreement import product_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXTS = (
    "Name three rivers.",
    "A baker sells loaves at two prices. On Monday she sold twelve small ones and five large ones, on Tuesday",
)
MOVED = 1e-5  # nats per token: less is no change of a policy, but rounding
STALE = 0.05  # share of the policy's own change below which an engine's answers have not changed
ENOUGH = 8  # tokens in the same place of the same answer, to say that


class _Answered(NamedTuple):
    tokens: tuple[int, ...]
    said: Tensor | None  # [T] log-probs by the server, nats
    own: Tensor  # [T] by the policy at that time


class OnPolicyCheck:
    """Compares a server's answers with the policy that it was handed, and with its answers of the time before.

    Rounding bounds what can be seen: the two may differ by what the coarser of the policy's dtype and bfloat16
    explains. A server that was not updated at all is found below that, since its answers have not changed.

    Args:
        tolerance: nats per token by which log-probs may differ on average, whatever the tokens; ``None``: what
            rounding explains.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self._before: dict[str, list[_Answered]] = {}  # by server
        self._warned: set[str] = set()

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, longest: int | None
    ) -> list[tuple[int, ...]]:
        """Return what to ask.

        Args:
            tokenizer: the policy's.
            model: the policy.
            longest: most tokens of prompt and answer together that the server takes; ``None``: as many as the model.
        """
        config = cast(Any, model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or sys.maxsize
        most = max(1, min(longest or sys.maxsize, context) - PROBE_TOKENS)
        found = [tuple(tokenizer(text)["input_ids"][:most]) for text in PROBE_TEXTS]
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def check(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[int, ...]],
        answers: Sequence[ProbeAnswer],
        *,
        server: str,
        weights: str,
    ) -> None:
        """Refuse a server whose greedy answers are not the policy's.

        Args:
            model: the policy.
            prompts: as :meth:`prompts` gave them.
            answers: of the server; those without tokens say nothing.
            server: where it is, for the error.
            weights: what the server was asked for, e.g. the adapter's name.

        Raises:
            ParityError: if tokens or log-probs lie further off than rounding explains, or have stayed as they were
                while the policy has changed.
        """
        heard = [pair for pair in zip(prompts, answers, strict=True) if pair[1].tokens]
        if not heard:
            return
        asked, said = [prompt for prompt, _ in heard], [answer for _, answer in heard]
        now = [_answered(model, prompt, answer) for prompt, answer in heard]
        before, self._before[server] = self._before.get(server, []), now
        reason = _stale(before, now) or self._off(model, asked, said, now, server=server)
        if reason is not None:
            raise ParityError(
                f"{server} does not sample from the current policy ({weights!r}), but from older or other weights: "
                f"{reason}: see that it serves the policy's own base model in the policy's dtype, or start it again"
            )

    def _off(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[int, ...]],
        answers: Sequence[ProbeAnswer],
        now: Sequence[_Answered],
        *,
        server: str,
    ) -> str | None:
        """Return how the answers differ from the policy's, or ``None``."""
        if self.tolerance is not None:
            return _drifted(now, self.tolerance)
        dtype = product_dtype(model)
        fine = disagreement(model, prompts, answers, dtype=dtype)
        if fine is None or dtype is torch.bfloat16:
            return fine
        coarse = disagreement(model, prompts, answers, dtype=torch.bfloat16, rounded_weights=True)
        if coarse is None and server not in self._warned:
            self._warned.add(server)
            warnings.warn(
                f"{server} answers as the policy does in bfloat16 only ({fine} in {dtype}): if it should compute in "
                "the policy's dtype, start it with that --dtype; a difference of this size may also be an adapter that "
                "is not applied",
                stacklevel=2,
            )
        return coarse


def _answered(model: nn.Module, prompt: tuple[int, ...], answer: ProbeAnswer) -> _Answered:
    own = token_logps(answer_logits(model, prompt, answer.tokens), torch.tensor(answer.tokens))
    said = None if answer.logps is None else torch.tensor(answer.logps)
    return _Answered(tuple(answer.tokens), said, own)


def _drifted(now: Sequence[_Answered], tolerance: float) -> str | None:
    gaps = [one.own - one.said for one in now if one.said is not None]
    if not gaps:
        return None
    drift = float(torch.cat(gaps).abs().mean())
    if drift <= tolerance:
        return None
    return f"its log-probs lie {drift:.2g} nat per token off the policy's (logp_tolerance {tolerance:g})"


def _stale(before: Sequence[_Answered], now: Sequence[_Answered]) -> str | None:
    """Return how the answers have stayed as they were while the policy changed, or ``None``."""
    own, said = [], []
    for old, new in zip(before, now, strict=False):
        if old.said is not None and new.said is not None:
            pairs = zip(old.tokens, new.tokens, strict=False)
            same = next(
                (place for place, (one, other) in enumerate(pairs) if one != other),
                min(len(old.tokens), len(new.tokens)),
            )
            own.append(new.own[:same] - old.own[:same])
            said.append(new.said[:same] - old.said[:same])
    if sum(map(len, own)) < ENOUGH:
        return None
    moved, followed = (float(torch.cat(each).abs().mean()) for each in (own, said))
    if moved < MOVED or followed >= STALE * moved:
        return None
    return (
        f"its log-probs have stayed as they were (by {followed:.2g} nat per token) since the last phase, while the "
        f"policy's moved by {moved:.2g}"
    )
