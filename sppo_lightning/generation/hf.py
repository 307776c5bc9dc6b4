"""Generation inside the training process, on a transformers model.

Shapes: P prompts of a batch, B rows (active sequences), V vocabulary.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.generation.sampling import sample_tokens
from sppo_lightning.system.device_memory import TokenBudget, free_bytes, ran_out, release
from sppo_lightning.types import Response, UserError

if TYPE_CHECKING:
    from sppo_lightning.generation.batched_decoding import Batching

MEMORY_SHARE = 0.4  # of the free memory, for the keys and values of a batch; the rest is for activations
MOST_ROWS = {"cpu": 128, "cuda": 512}  # where more rows at once gain nothing
RECORDED_ON = ("cuda",)  # devices on which launching a step's kernels takes longer than the kernels
WORTH_RECORDING = 16  # tokens of a response from which on it pays to record a step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Responses to one request that are decoded in the same batch."""

    index: int  # of the request
    request: SampleRequest

    @property
    def rows(self) -> int:
        return max(1, len(self.request.seeds))

    def split(self, rows: int) -> tuple[_Part, _Part]:
        seeds = self.request.seeds
        return (
            replace(self, request=self.request._replace(seeds=seeds[:rows])),
            replace(self, request=self.request._replace(seeds=seeds[rows:])),
        )


class HFGenerator(Generator):
    """Samples with the policy itself: a prompt is prefilled once for all its responses of a batch.

    Responses depend on their seeds only: batch size and order change none of them in float32 (in bfloat16 a
    near-tie may fall the other way). The first policy is checked before anything is sampled: prompts of any length may
    share a batch, or of one length only, or the model is refused.

    Args:
        batch_size: responses decoded at once; ``None``: what the memory holds. Too many are halved and tried again.
        cuda_graphs: on a GPU, record a decoding step once and replay it, where the model gives the same log-probs so;
            most models with full attention do.
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`.
    """

    def __init__(self, batch_size: int | None = None, cuda_graphs: bool = True, **sampling: Any) -> None:
        super().__init__(**sampling)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"HFGenerator.batch_size={batch_size} must be at least 1")
        self.batch_size = batch_size
        self.cuda_graphs = cuda_graphs
        self._policy: PolicySource | None = None
        self._model: torch.nn.Module | None = None
        self._batching: Batching | None = None  # found out once
        self._budget: TokenBudget | None = None
        self._recorded: bool | None = None  # whether steps are; found out once

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Count the rows that a batch of the longest responses would have."""
        fitting = int(MEMORY_SHARE * free) // max(1, row)
        most = self.batch_size or MOST_ROWS.get(device.type, MOST_ROWS["cuda"])
        return EngineMemory(copies=True, rows=max(1, min(most, fitting)))

    def load(self, policy: PolicySource) -> None:
        """Take a sampling model from the policy.

        Raises:
            UserError: if a batch's responses would not be the model's own.
        """
        from sppo_lightning.generation.batched_decoding import check_batching

        self._policy = policy
        self._model = policy.sampling_model()
        if self._batching is None:
            self._batching = check_batching(self._model)
        if self._budget is None and self.batch_size is not None:
            self._budget = TokenBudget(sys.maxsize)
        elif self._budget is None:
            tokens = MEMORY_SHARE * free_bytes(self._device) / self._batching.row.token
            self._budget = TokenBudget(int(tokens))
        if self._recorded is None:
            self._recorded = self.cuda_graphs and self._can_record()

    def _can_record(self) -> bool:
        from sppo_lightning.generation.fixed_steps import parity_failure

        if self._device.type not in RECORDED_ON or self.max_new_tokens < WORTH_RECORDING:
            return False
        assert self._model is not None
        reason = parity_failure(self._model)
        if reason is not None:
            logger.info("Sampling without CUDA graphs: %s", reason)
        return reason is None

    def unload(self) -> None:
        """Free the sampling model."""
        if self._model is not None:
            device = self._device
            self._model = None
            release(device)

    @property
    def _device(self) -> torch.device:
        assert self._model is not None
        return next(self._model.parameters()).device

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield responses batch by batch, prompts of similar length together."""
        by_length = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
        queue = deque(_Part(index, requests[index]) for index in by_length)
        finished: dict[int, list[Response]] = {}
        while queue:
            batch = self._next_batch(queue)
            answers = self._answer(batch)
            if answers is None:
                queue.extendleft(reversed(batch))
                continue
            for part, responses in zip(batch, answers, strict=True):
                have = finished.setdefault(part.index, [])
                have += responses
                if len(have) == max(1, len(requests[part.index].seeds)):
                    yield PromptResponses(part.index, finished.pop(part.index))

    def _next_batch(self, queue: deque[_Part]) -> list[_Part]:
        """Take from the queue, prompts in ascending length, what fits a batch."""
        assert self._budget is not None
        assert self._batching is not None
        most = self.batch_size or MOST_ROWS.get(self._device.type, MOST_ROWS["cuda"])
        batch: list[_Part] = []
        rows = 0
        while queue and rows < most:
            part = queue[0]
            prompt = len(part.request.token_ids)
            if batch and not self._batching.padded and prompt != len(batch[0].request.token_ids):
                break
            length = self._batching.row.tokens(prompt + self.max_new_tokens)
            room = min(most - rows, part.rows)
            while room > 0 and not self._budget.holds(rows + room, length):
                room -= 1
            if room < part.rows and (batch or room == 0):
                break  # a prompt's responses stay together where they fit a batch of their own
            queue.popleft()
            if room < part.rows:
                part, rest = part.split(room)
                queue.appendleft(rest)
            batch.append(part)
            rows += part.rows
        return batch

    def _answer(self, batch: list[_Part]) -> list[list[Response]] | None:
        """Return the responses of each part, or ``None`` if the batch has to be tried again, another way."""
        from sppo_lightning.generation.cuda_graph import CannotRecordError

        assert self._policy is not None
        assert self._budget is not None
        assert self._batching is not None
        rows = sum(part.rows for part in batch)
        length = len(batch[-1].request.token_ids) + self.max_new_tokens
        try:
            tokens = iter(self._decode([part.request for part in batch], self._policy.end_token_ids))
        except CannotRecordError as error:
            # not of the policy that was checked: its adapter may have been off
            logger.info("Sampling without CUDA graphs from here on: %s", error)
            self._recorded = False
            return None
        except Exception as error:
            if not ran_out(error):
                raise
            if rows == 1:
                raise UserError(
                    f"one response of up to {length} tokens, prompt included, does not fit into the memory of "
                    f"{self._device}: lower max_new_tokens or data.max_prompt_tokens, or use a smaller policy"
                ) from error
        else:
            policy = self._policy
            return [[self.as_response(next(tokens), policy) for _ in range(part.rows)] for part in batch]
        self._budget.halve(rows, self._batching.row.tokens(length))
        release(self._device)
        warnings.warn(
            f"{rows} responses of up to {length} tokens did not fit into memory at once: halving the batch",
            stacklevel=2,
        )
        return None

    @torch.inference_mode()
    def _decode(self, batch: list[SampleRequest], ends: frozenset[int]) -> list[list[int]]:
        """Return the sampled token ids of every response, in request order."""
        from sppo_lightning.generation.cache import reserved_cache
        from sppo_lightning.generation.fixed_steps import FixedSteps
        from sppo_lightning.generation.steps import PlainSteps, left_padded, read_prompts

        model = self._model
        assert model is not None
        assert self._batching is not None
        device = self._device
        lengths = [len(request.token_ids) for request in batch]
        width = max(lengths)
        input_ids, mask, positions = left_padded(
            [request.token_ids for request in batch], self.max_new_tokens, device
        )
        cache = reserved_cache(cast(Any, model).config)
        begun = time.monotonic()
        logits = read_prompts(
            model,
            [request.token_ids for request in batch],
            input_ids,
            mask[:, :width],
            positions,
            cache,
            shares_prefix=self._batching.shares_prefix,
        )
        read_seconds = time.monotonic() - begun
        copies = torch.tensor([max(1, len(request.seeds)) for request in batch], device=device)
        source = torch.arange(len(batch), device=device).repeat_interleave(copies)
        logits, position = logits[source], positions[source, -1]
        longest = torch.tensor([self.longest_response(length) for length in lengths], device=device)[source]
        uniforms = self._uniforms(batch).to(device)
        greedy = {not request.seeds for request in batch}
        end_ids = torch.tensor(sorted(ends), device=device)
        stopped = self._stop_test()
        tokens = torch.full((len(source), self.max_new_tokens), -1, dtype=torch.long, device=device)
        alive = torch.arange(len(source), device=device)  # the response of each row of the batch
        active = torch.ones(len(source), dtype=torch.bool, device=device)  # [B]
        sampled = 0
        kind = FixedSteps if self._recorded else PlainSteps
        with kind(model, cache, source, mask, width) as steps:
            for step in range(self.max_new_tokens):
                picked = self._pick(logits, uniforms[alive, step], greedy)
                tokens[alive, step] = torch.where(active, picked, -1)
                active &= ~torch.isin(picked, end_ids) & (longest[alive] > step + 1)
                if stopped is not None:
                    active &= ~stopped(tokens[alive, : step + 1])
                left = int(active.sum())
                if self.on_batch_progress is not None:
                    sampled += len(alive)
                    self.on_batch_progress(
                        len(batch)
                        * self._share(step, left / len(source), read_seconds, time.monotonic() - begun),
                        sampled,
                    )
                if left == 0:
                    break
                if steps.worth_compacting(left, len(alive)):
                    rows = active.nonzero().flatten()
                    steps.keep(rows)
                    position, picked, alive, active = (
                        each[rows] for each in (position, picked, alive, active)
                    )
                position = position + active  # one that is done stays in the model's table of positions
                logits = steps.logits(picked, position)
        return [[token for token in row if token >= 0] for row in tokens.tolist()]

    def _share(self, step: int, left: float, read_seconds: float, spent: float) -> float:
        """Return how much of a batch's time has gone, in (0, 1].

        Args:
            step: tokens decoded after the first one, which comes of reading the prompts.
            left: share of the responses that have not ended.
            read_seconds: that reading the prompts took, once, before all.
            spent: seconds in all.
        """
        if left == 0:
            return 1.0
        decoded = max(step / self.max_new_tokens, 1 - left)
        if decoded == 0:  # nothing says yet how long a token takes
            return 1 / self.max_new_tokens
        whole = read_seconds + (spent - read_seconds) / decoded
        return min(spent / whole, 1.0) if whole > 0 else decoded  # a clock that stands still

    def _stop_test(self) -> Callable[[Tensor], Tensor] | None:
        """Return a test of responses ``[B, T]``, the newest token last, for a stop string, ``[B]``."""
        if self.stop is None:
            return None
        from transformers import StopStringCriteria

        assert self._policy is not None
        stops = StopStringCriteria(self._policy.tokenizer, self.stop)
        return lambda tokens: stops(tokens.clamp(min=0), None)

    def _pick(self, logits: Tensor, uniforms: Tensor, greedy: set[bool]) -> Tensor:
        """Return the next token of each row, ``[B]``.

        Args:
            logits: ``[B, V]``.
            uniforms: ``[B]`` draws; NaN asks for the most likely token.
            greedy: whether rows ask for that: all, none, or some of each.
        """
        if greedy == {True}:
            return logits.argmax(-1)
        drawn = sample_tokens(
            logits,
            uniforms.nan_to_num(0.0),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        return drawn if greedy == {False} else torch.where(uniforms.isnan(), logits.argmax(-1), drawn)

    def _uniforms(self, batch: Sequence[SampleRequest]) -> Tensor:
        """Return one draw per response and token, ``[B, max_new_tokens]`` float64; NaN for greedy rows."""
        rows = []
        for request in batch:
            for seed in request.seeds:
                generator = torch.Generator().manual_seed(seed)
                rows.append(torch.rand(self.max_new_tokens, generator=generator, dtype=torch.float64))
            if not request.seeds:
                rows.append(torch.full((self.max_new_tokens,), float("nan"), dtype=torch.float64))
        return torch.stack(rows)
