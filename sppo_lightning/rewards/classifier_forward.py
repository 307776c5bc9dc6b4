"""Batches of a reward model: similar lengths together, and a prompt read once for all its responses.

Shapes: G groups (a prompt's conversations), N conversations of a batch, P tokens that a group shares, S tokens of the
rest.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sppo_lightning.policy.agreement import Agreement, compare_logps, product_dtype
from sppo_lightning.policy.rounding import off_by_a_rounding
from sppo_lightning.system.device_memory import TokenBudget, free_bytes, ran_out, release
from sppo_lightning.types import UserError, first_line

Encoded = Mapping[str, list[int]]
"""A conversation as the tokenizer gives it: ``input_ids`` and what goes with them."""

MOST_TOKENS = {"cpu": 8192, "cuda": 131072}  # where more tokens at once gain nothing
MEMORY_SHARE = 0.4  # of the free memory, for the activations of a batch
ACTIVATIONS = 24  # hidden states that a layer holds at once, roughly
WORTH_SHARING = 8  # tokens; a shorter common beginning is read again
PROBE_RESTS = range(
    1, 9
)  # tokens after the shared ones: scores of fewer conversations say little about roundings
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Conversations that share their first tokens."""

    rows: tuple[int, ...]
    shared: int  # tokens


class ClassifierForward:
    """Scores conversations with a logit of a sequence-classification model.

    Args:
        model: the model, in eval mode.
        batch_tokens: most tokens of a batch, padding included; ``None``: what the memory holds.
        label: which logit is the score.
    """

    def __init__(self, model: Any, batch_tokens: int | None, label: int = 0) -> None:
        self.model = model
        self.label = label
        self._has_padding = model.config.get_text_config().pad_token_id is not None
        self._padding: int | None = model.config.get_text_config().pad_token_id
        device = model.device.type
        if batch_tokens is None:
            config = model.config.get_text_config()
            bytes_per_token = ACTIVATIONS * config.hidden_size * next(model.parameters()).dtype.itemsize
            fitting = int(MEMORY_SHARE * free_bytes(model.device) / bytes_per_token)
            batch_tokens = min(fitting, MOST_TOKENS.get(device, MOST_TOKENS["cuda"]))
        self._budget = TokenBudget(batch_tokens)
        self._shares: bool | None = None

    @torch.inference_mode()
    def scores(self, encoded: Sequence[Encoded], owners: Sequence[Hashable]) -> list[float]:
        """Return one score a conversation; neighbours with the same owner answer the same prompt.

        Raises:
            UserError: if a single conversation does not fit into memory.
        """
        ids = [tuple(tokens["input_ids"]) for tokens in encoded]
        self._choose_padding(ids)
        if self._shares is None and len(_runs(owners)) < len(owners):
            self._shares = self._may_share(ids)
        groups = common_beginnings(ids, owners if self._shares else range(len(ids)), self._padding)
        groups.sort(key=lambda group: (group.shared > 0, max(len(ids[row]) for row in group.rows)))
        queue = deque(groups)
        found = [float("nan")] * len(ids)
        while queue:
            batch = self._next_batch(queue, ids)
            rows = [row for group in batch for row in group.rows]
            logits = self._try(batch, rows, ids, encoded)
            if logits is None:
                queue.extendleft(reversed(batch))
                continue
            for row, score in zip(rows, logits.float().tolist(), strict=True):
                found[row] = score
        return found

    def _choose_padding(self, ids: Sequence[tuple[int, ...]]) -> None:
        """A decoder's logit is read at the last token that is not the model's padding token; hence that token pads.

        A model without one gets a token that ends no conversation.
        """
        if not self._has_padding:
            ends = {row[-1] for row in ids}
            self._padding = next(token for token in range(len(ends) + 1) if token not in ends)
            self.model.config.get_text_config().pad_token_id = self._padding

    def _next_batch(self, queue: deque[Group], ids: Sequence[tuple[int, ...]]) -> list[Group]:
        """Take groups of one kind, in ascending length, that fit the budget together; cut one that is too large."""
        batch: list[Group] = []
        rows = shared = rest = 0
        while queue:
            group = queue[0]
            if batch and (group.shared > 0) != (batch[0].shared > 0):
                break
            wider = max(shared, group.shared), max(rest, _width([group], ids) - group.shared)
            room = len(group.rows)
            while not self._budget.holds(rows + room, sum(wider)) and room > (0 if batch else 1):
                room -= 1
            if batch and room < len(group.rows):
                break
            queue.popleft()
            if room < len(group.rows):
                queue.appendleft(replace(group, rows=group.rows[room:]))
                return [replace(group, rows=group.rows[:room])]
            batch.append(group)
            rows += room
            shared, rest = wider
        return batch

    def _try(
        self,
        batch: Sequence[Group],
        rows: Sequence[int],
        ids: Sequence[tuple[int, ...]],
        encoded: Sequence[Encoded],
    ) -> Tensor | None:
        """Return the logits of a batch, ``[N]``, or ``None`` if it did not fit into memory."""
        longest = max(len(ids[row]) for row in rows)
        try:
            if batch[0].shared:
                return self._shared_logits(batch, ids)
            return self._logits([encoded[row] for row in rows])
        except Exception as error:
            if not ran_out(error):
                raise
            if len(rows) == 1:
                raise UserError(
                    f"one conversation of {longest} tokens does not fit into the memory of {self.model.device} next to "
                    "the reward model: set its max_tokens, or quantization: nf4"
                ) from error
        self._budget.halve(len(rows), _width(batch, ids))
        release(self.model.device)
        warnings.warn(
            f"{len(rows)} conversations of up to {longest} tokens did not fit into memory at once: halving the batch",
            stacklevel=2,
        )
        return None

    def _logits(self, rows: Sequence[Encoded]) -> Tensor:
        """Return the logits of whole conversations, padded on the right, ``[N]``."""
        padding = self._padding
        assert padding is not None
        batch = {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=padding if name == "input_ids" else 0,
            ).to(self.model.device)
            for name in rows[0]
        }
        logits: Tensor = self.model(**batch).logits
        return logits[:, self.label]

    def _shared_logits(self, groups: Sequence[Group], ids: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the logits of conversations whose common beginning is read once, ``[N]``."""
        from transformers import DynamicCache

        device, padding = self.model.device, self._padding
        assert padding is not None
        cache = DynamicCache(config=self.model.config)
        width = max(group.shared for group in groups)
        mask = torch.zeros(len(groups), width, dtype=torch.long)
        first = torch.full_like(mask, padding)
        for number, group in enumerate(groups):
            mask[number, width - group.shared :] = 1
            first[number, width - group.shared :] = torch.tensor(ids[group.rows[0]][: group.shared])
        self.model(
            input_ids=first.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(-1) - 1).clamp_(min=0).to(device),
            past_key_values=cache,
            use_cache=True,
        )
        source = torch.tensor([number for number, group in enumerate(groups) for _ in group.rows])
        cache.batch_select_indices(source.to(device))
        rest = [torch.tensor(ids[row][group.shared :]) for group in groups for row in group.rows]
        suffix = pad_sequence(rest, batch_first=True, padding_value=padding)
        real = pad_sequence([torch.ones_like(tokens) for tokens in rest], batch_first=True)
        starts = torch.tensor([group.shared for group in groups])[source]
        logits: Tensor = self.model(
            input_ids=suffix.to(device),
            attention_mask=torch.cat([mask[source], real], dim=1).to(device),
            position_ids=(starts[:, None] + torch.arange(suffix.shape[1])).to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, self.label]

    def _may_share(self, ids: Sequence[tuple[int, ...]]) -> bool:
        """Whether a beginning that is read once gives the scores that whole conversations give; checked once."""
        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            log.info(
                "%s keeps no keys and values: each response is scored with its prompt",
                type(self.model).__name__,
            )
            return False
        tokens = [token for token in dict.fromkeys(t for row in ids for t in row) if token != self._padding]
        tokens = (tokens * (2 * WORTH_SHARING))[: 2 * WORTH_SHARING]
        probe = [tuple(tokens + tokens[:extra]) for extra in PROBE_RESTS]
        together = Group(tuple(range(len(probe))), len(tokens))
        try:
            shared = self._shared_logits([together], probe)
        except Exception as error:
            if not (ran_out(error) or isinstance(error, TypeError | ValueError | NotImplementedError)):
                raise
            log.info("%s cannot read a prompt once (%s)", type(self.model).__name__, first_line(error))
            return False
        rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in probe]
        alone, dtype = self._logits(rows), product_dtype(self.model)
        agreement = _compare_scores(alone, shared, dtype)
        if not agreement.holds:
            with off_by_a_rounding(self.model, dtype):
                nudged = self._logits(rows)
            agreement = agreement.allowing(_compare_scores(alone, nudged, dtype).drift)
        if not agreement.holds:
            log.info(
                "%s scores a prompt that is read once differently (by %.2g, tolerance %.2g): each response is scored "
                "with its prompt",
                type(self.model).__name__,
                *agreement,
            )
        return agreement.holds


def _compare_scores(alone: Tensor, other: Tensor, dtype: torch.dtype) -> Agreement:
    """Compare scores ``[N]`` as log-probs are compared, each relative to its size, for which there is no scale."""
    held = torch.promote_types(alone.dtype, torch.float32)
    size = 1 + alone.to(held).abs()
    return compare_logps(alone / size, other / size, best_logits=alone / size, dtype=dtype)


def common_beginnings(
    ids: Sequence[tuple[int, ...]], owners: Sequence[Hashable], padding: int | None
) -> list[Group]:
    """Group neighbours with the same owner that begin alike; the others stand alone.

    A conversation's last token that is not ``padding`` stays outside: its score is read there.

    Args:
        ids: token ids of each conversation.
        owners: whose conversation it is.
        padding: the model's padding token, which may also occur in conversations.
    """
    groups: list[Group] = []
    for start, stop in _runs(owners):
        rows = tuple(range(start, stop))
        shared = min(_last_token(ids[row], padding) for row in rows)
        columns = zip(*(ids[row][:shared] for row in rows), strict=True)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        if len(rows) > 1 and shared >= WORTH_SHARING:
            groups.append(Group(rows, shared))
        else:
            groups += [Group((row,), 0) for row in rows]
    return groups


def _width(groups: Sequence[Group], ids: Sequence[tuple[int, ...]]) -> int:
    """Return the tokens of a row of a batch: the longest beginning, and the longest rest."""
    rest = max(len(ids[row]) - group.shared for group in groups for row in group.rows)
    return max(group.shared for group in groups) + rest


def _runs(owners: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return the bounds of runs of equal neighbours."""
    cuts = [row for row in range(1, len(owners)) if owners[row] != owners[row - 1]]
    bounds = [0, *cuts, len(owners)]
    return [(start, stop) for start, stop in pairwise(bounds) if stop > start]


def _last_token(ids: tuple[int, ...], padding: int | None) -> int:
    """Return the position of the last token that is not ``padding``; 0 if there is none."""
    return next((place for place in range(len(ids) - 1, 0, -1) if ids[place] != padding), 0)
