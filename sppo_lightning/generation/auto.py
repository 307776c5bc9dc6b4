"""Generation with whichever engine of this process is faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sppo_lightning.generation.continuous import ContinuousBatchingGenerator
from sppo_lightning.generation.hf import HFGenerator
from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import UserError

logger = logging.getLogger(__name__)

CLEARLY_FASTER = 1.1  # by which continuous batching must win, since its responses cannot be sampled again
TIMED_PROMPTS = 16
TIMED_RESPONSES = 4  # a prompt
TIMED_PROMPT_TOKENS = 64


class Rates(NamedTuple):
    """What the engines sample, in tokens per second."""

    hf: float
    continuous: float


class AutoGenerator(Generator):
    """Samples with :class:`HFGenerator` or, on a GPU where it is faster, :class:`ContinuousBatchingGenerator`.

    The first :meth:`load` on a GPU times both on the same made-up prompts; the choice holds for the run. A policy
    that continuous batching does not reproduce or cannot hold, stop strings, and a CPU (where it is several times
    slower) leave :class:`HFGenerator`. Reproducible only where that is certain.

    Args:
        batch_size: responses decoded at once; ``None``: what the memory holds.
        cuda_graphs: as :class:`HFGenerator` takes it.
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`.
    """

    def __init__(self, batch_size: int | None = None, cuda_graphs: bool = True, **sampling: Any) -> None:
        super().__init__(**sampling)
        self._hf = HFGenerator(batch_size, cuda_graphs, **sampling)
        self._continuous = (
            ContinuousBatchingGenerator(batch_size, **sampling)
            if self.stop is None and torch.cuda.is_available()
            else None
        )
        self._chosen: Generator | None = None

    @property
    def cuda_graphs(self) -> bool:
        """Whether :class:`HFGenerator` may record its steps."""
        return self._hf.cuda_graphs

    @property
    def reproducible(self) -> bool:
        """Whether it is certain that :class:`HFGenerator` samples."""
        return self._continuous is None

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Return what :class:`HFGenerator` takes."""
        return self._hf.memory(row, free=free, total=total, device=device)

    def load(self, policy: PolicySource) -> None:
        """Load the engine of this run, chosen the first time."""
        if self._chosen is None:
            self._chosen = self._choose(policy)
        try:
            self._chosen.load(policy)
        except UserError as refusal:  # of a later policy
            if self._chosen is self._hf:
                raise
            logger.info("Sampling with HFGenerator from here on: %s", refusal)
            self._chosen = self._hf
            self._chosen.load(policy)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield the responses of the chosen engine."""
        assert self._chosen is not None
        return self._chosen.generate(requests)

    def unload(self) -> None:
        """Free what the chosen engine took."""
        if self._chosen is not None:
            self._chosen.unload()

    def _choose(self, policy: PolicySource) -> Generator:
        if self._continuous is None or next(policy.sampling_model().parameters()).device.type == "cpu":
            return self._hf
        requests = timed_requests(len(policy.tokenizer), self.max_total_tokens)
        return faster_engine(self._hf, self._continuous, policy, requests)


def faster_engine(
    hf: HFGenerator,
    continuous: ContinuousBatchingGenerator,
    policy: PolicySource,
    requests: Sequence[SampleRequest],
) -> Generator:
    """Return the engine to sample a policy with, and log why; none of them is left loaded."""
    try:
        rate = sampling_rate(continuous, policy, requests)
    except UserError as refusal:
        logger.info("Sampling with HFGenerator: %s", refusal)
        return hf
    try:
        rates = Rates(sampling_rate(hf, policy, requests), rate)
    except UserError as refusal:
        logger.info("Sampling with continuous batching: %s", refusal)
        return continuous
    chosen = continuous if continuous_is_worth_it(rates) else hf
    logger.info(
        "Sampling with %s: HFGenerator makes %.0f tokens/s here, continuous batching %.0f",
        type(chosen).__name__,
        *rates,
    )
    return chosen


def continuous_is_worth_it(rates: Rates) -> bool:
    """Return whether continuous batching is clearly faster."""
    return rates.continuous > CLEARLY_FASTER * rates.hf


def timed_requests(vocabulary: int, max_total_tokens: int | None) -> list[SampleRequest]:
    """Return the same made-up requests for the same vocabulary size.

    Args:
        vocabulary: number of token ids to draw the prompts from.
        max_total_tokens: most tokens of prompt and response together; prompts take at most half of them.
    """
    length = TIMED_PROMPT_TOKENS
    if max_total_tokens is not None:
        length = min(length, max_total_tokens // 2)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (TIMED_PROMPTS, length), generator=generator).tolist()
    return [
        SampleRequest(
            tuple(prompt), tuple(derive_seed("trial", row, index) for index in range(TIMED_RESPONSES))
        )
        for row, prompt in enumerate(prompts)
    ]


def sampling_rate(engine: Generator, policy: PolicySource, requests: Sequence[SampleRequest]) -> float:
    """Return the tokens per second that an engine samples, from its second round on; it is unloaded after."""
    engine.load(policy)
    try:
        for _ in engine.generate(requests):
            pass
        start = time.perf_counter()
        answers = list(engine.generate(requests))
        seconds = time.perf_counter() - start
    finally:
        engine.unload()
    return sum(len(response.token_ids) for answer in answers for response in answer.responses) / seconds
