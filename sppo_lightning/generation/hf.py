"""Generation inside the training process, on a transformers model.

Shapes: P prompts of a batch, B rows (responses still growing), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sppo_lightning.generation.protocol import Generator, PolicySource, PromptResponses, SampleRequest
from sppo_lightning.generation.sampling import sample_tokens
from sppo_lightning.types import Response

COMPACT_BELOW = 0.75  # share of rows still growing under which finished rows leave the batch


class HFGenerator(Generator):
    """Samples with the policy itself: a prompt is prefilled once for all its responses that grow at once.

    Responses depend on their seeds only: batch size and order change none of them in float32 (in bfloat16 a
    near-tie may fall the other way).

    Args:
        max_new_tokens: longest response, in tokens, its end token included.
        temperature: divides the logits; greater than 0. Held-out answers are greedy whatever it is.
        top_p: sample from the smallest set of tokens that holds this probability, in (0, 1].
        top_k: sample from the k most likely tokens; 0 for all.
        batch_size: responses that grow at once.
    """

    def __init__(
        self,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 32,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"HFGenerator.max_new_tokens={max_new_tokens} must be at least 1")
        if not temperature > 0:
            raise ValueError(
                f"HFGenerator.temperature={temperature} must be greater than 0: identical samples make no pair"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"HFGenerator.top_p={top_p} must lie in (0, 1]")
        if top_k < 0:
            raise ValueError(f"HFGenerator.top_k={top_k} must be 0 (all tokens) or more")
        if batch_size < 1:
            raise ValueError(f"HFGenerator.batch_size={batch_size} must be at least 1")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.batch_size = batch_size
        self._policy: PolicySource | None = None
        self._model: torch.nn.Module | None = None

    def load(self, policy: PolicySource) -> None:
        """Take a sampling model from the policy."""
        self._policy = policy
        self._model = policy.sampling_model()

    def unload(self) -> None:
        """Free the sampling model."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield responses batch by batch, prompts of similar length together."""
        grown: dict[int, list[Response]] = {}
        for batch in self._batches(requests):
            for index, responses in self._answer(batch):
                have = grown.setdefault(index, [])
                have += responses
                if len(have) == max(1, len(requests[index].seeds)):
                    yield PromptResponses(index, grown.pop(index))

    def _batches(self, requests: Sequence[SampleRequest]) -> Iterator[list[tuple[int, SampleRequest]]]:
        """Yield parts of requests that fit ``batch_size`` together, with the position of their request."""
        batch: list[tuple[int, SampleRequest]] = []
        rows = 0
        for index in sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids)):
            seeds = requests[index].seeds
            for start in range(0, max(1, len(seeds)), self.batch_size):
                part = requests[index]._replace(seeds=seeds[start : start + self.batch_size])
                wanted = max(1, len(part.seeds))
                if batch and rows + wanted > self.batch_size:
                    yield batch
                    batch, rows = [], 0
                batch.append((index, part))
                rows += wanted
        if batch:
            yield batch

    def _answer(self, batch: list[tuple[int, SampleRequest]]) -> Iterator[tuple[int, list[Response]]]:
        assert self._policy is not None
        ends = self._policy.end_token_ids
        rows = iter(self._decode([part for _, part in batch], ends))
        for index, part in batch:
            yield index, [self._response(next(rows), ends) for _ in range(max(1, len(part.seeds)))]

    def _response(self, tokens: list[int], ends: frozenset[int]) -> Response:
        assert self._policy is not None
        finished = tokens[-1] in ends
        text = self._policy.tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True)
        return Response(tuple(tokens), str(text), "stop" if finished else "length")

    @torch.inference_mode()
    def _decode(self, batch: list[SampleRequest], ends: frozenset[int]) -> list[list[int]]:
        """Return the sampled token ids of every response, in request order."""
        from transformers import DynamicCache

        model = self._model
        assert model is not None
        device = next(model.parameters()).device
        lengths = [len(request.token_ids) for request in batch]
        width = max(lengths)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width + self.max_new_tokens, dtype=torch.long)
        for row, request in enumerate(batch):
            input_ids[row, width - lengths[row] :] = torch.tensor(request.token_ids)
            mask[row, width - lengths[row] : width] = 1
        positions = (mask[:, :width].cumsum(-1) - 1).clamp_(min=0)
        input_ids, mask, positions = input_ids.to(device), mask.to(device), positions.to(device)
        cache = DynamicCache(config=cast(Any, model).config)

        def forward(tokens: Tensor, seen: int, position_ids: Tensor) -> Tensor:
            output = model(
                input_ids=tokens,
                attention_mask=mask[:, :seen],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            last: Tensor = output.logits[:, -1]
            return last.float()

        logits = forward(input_ids, width, positions)
        copies = torch.tensor([max(1, len(request.seeds)) for request in batch], device=device)
        source = torch.arange(len(batch), device=device).repeat_interleave(copies)
        cache.batch_select_indices(source)
        logits, mask = logits[source], mask[source]
        position = positions[source, -1]
        uniforms = self._uniforms(batch).to(device)
        end_ids = torch.tensor(sorted(ends), device=device)
        tokens = torch.full((len(source), self.max_new_tokens), -1, dtype=torch.long, device=device)
        alive = torch.arange(len(source), device=device)  # the response that each row of the batch grows
        growing = torch.ones(len(source), dtype=torch.bool, device=device)  # [B]
        for step in range(self.max_new_tokens):
            picked = self._pick(logits, uniforms[alive, step])
            tokens[alive[growing], step] = picked[growing]
            growing &= ~torch.isin(picked, end_ids)
            left = int(growing.sum())
            if left == 0 or step + 1 == self.max_new_tokens:
                break
            if left < COMPACT_BELOW * len(alive):
                rows = growing.nonzero().flatten()
                cache.batch_select_indices(rows)
                mask, position, picked, alive = mask[rows], position[rows], picked[rows], alive[rows]
                growing = growing[rows]
            position = position + 1
            mask[:, width + step] = 1
            logits = forward(picked[:, None], width + step + 1, position[:, None])
        return [[token for token in row if token >= 0] for row in tokens.tolist()]

    def _pick(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return the next token of each row; a NaN draw asks for the most likely one."""
        greedy = uniforms.isnan()
        tokens = torch.empty_like(uniforms, dtype=torch.long)
        if bool(greedy.any()):
            tokens[greedy] = logits[greedy].argmax(-1)
        if not bool(greedy.all()):
            tokens[~greedy] = sample_tokens(
                logits[~greedy],
                uniforms[~greedy],
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
        return tokens

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
