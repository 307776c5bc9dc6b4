"""Generation inside the training process through transformers' continuous batching and its paged cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sppo_lightning.generation.parity import PROBE_TOKENS, ProbeAnswer, check_parity
from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.policy.anatomy import embedding_rows
from sppo_lightning.seeding import derive_seed
from sppo_lightning.types import Response, UserError, first_line

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput

CPU_ROWS = 16  # responses decoded at once on a CPU, unless batch_size says otherwise
CPU_BATCH_TOKENS = 256  # of one forward pass on a CPU, where the attention mask is as wide as the whole cache
PAGE = 256  # tokens of a page of the cache, the engine's default
MEMORY_SHARE = 0.6  # of a GPU's free memory, for the paged cache; the rest is for logits and their sorting
POLL_SECONDS = 1.0


class ContinuousBatchingGenerator(Generator):
    """Samples with the policy itself through the engine behind transformers' ``generate_batch``.

    Finished responses make room for waiting ones at every token, and prompts that begin alike share pages of the
    cache. Not reproducible: the engine takes no seed for a response. One call of :meth:`generate` draws from one
    stream, seeded by all its requests, so that a response also depends on what else is asked for.

    Every :meth:`load` checks the engine against the policy's plain forward: a policy that it does not reproduce,
    quantised or not, is refused.

    Args:
        batch_size: responses decoded at once; ``None``: what the memory holds (16 on a CPU).
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`.
    """

    def __init__(self, batch_size: int | None = None, **sampling: Any) -> None:
        super().__init__(**sampling)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"ContinuousBatchingGenerator.batch_size={batch_size} must be at least 1")
        if self.stop is not None:
            raise ValueError(
                f"ContinuousBatchingGenerator.stop={self.stop} cannot be honoured, since its engine ends responses at "
                "end tokens only: use sppo_lightning.generation.HFGenerator"
            )
        self.batch_size = batch_size
        self._policy: PolicySource | None = None
        self._engine: _Engine | None = None

    @property
    def reproducible(self) -> bool:
        """Never: what shares a batch shares its random stream."""
        return False

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Count the longest responses that the paged cache holds."""
        fitting = max(1, int(MEMORY_SHARE * free) // max(1, row))
        most = self.batch_size or (CPU_ROWS if device.type == "cpu" else fitting)
        return EngineMemory(copies=True, rows=min(most, fitting))

    def load(self, policy: PolicySource) -> None:
        """Take a sampling model from the policy, and check the engine on it.

        Raises:
            ParityError: if the engine does not reproduce the policy.
        """
        self._policy = policy
        self._engine = _Engine(policy.sampling_model(), self.batch_size)
        model = self._engine.model
        vocabulary = min(len(policy.tokenizer), embedding_rows(model))
        try:
            check_parity(model, self._probe, engine="ContinuousBatchingGenerator", vocabulary=vocabulary)
        except UserError:
            self.unload()
            raise

    def unload(self) -> None:
        """Free the engine's cache and the sampling model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield a request's responses as soon as the last of them is complete.

        The engine samples all its responses one way: greedy requests come first where both kinds are asked for.

        Raises:
            UserError: if the engine fails.
        """
        for greedy in (True, False):
            positions = [index for index, request in enumerate(requests) if greedy == (not request.seeds)]
            if positions:
                yield from self._answer(requests, positions, greedy=greedy)

    def _answer(
        self, requests: Sequence[SampleRequest], positions: Sequence[int], *, greedy: bool
    ) -> Iterator[PromptResponses]:
        assert self._engine is not None
        assert self._policy is not None
        owners = [index for index in positions for _ in range(max(1, len(requests[index].seeds)))]
        prompts = [requests[index].token_ids for index in owners]
        queue = [EngineRequest(prompt, self.longest_response(len(prompt))) for prompt in prompts]
        seed = derive_seed(*(seed for index in positions for seed in requests[index].seeds))
        purpose = Purpose(self._sampling(greedy=greedy), sorted(self._policy.end_token_ids))
        finished: dict[int, dict[int, Response]] = {}
        try:
            for row, output in self._engine.run(queue, purpose, seed=seed):
                index = owners[row]
                have = finished.setdefault(index, {})
                have[row] = self.as_response(output.generated_tokens, self._policy)
                if len(have) == max(1, len(requests[index].seeds)):
                    yield PromptResponses(index, [have[row] for row in sorted(finished.pop(index))])
        except EngineError as error:
            raise UserError(
                f"continuous batching failed ({first_line(error)}): lower data.generator.init_args.batch_size, or use "
                "sppo_lightning.generation.HFGenerator"
            ) from error

    def _sampling(self, *, greedy: bool) -> dict[str, Any]:
        if greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def _probe(self, prompts: Sequence[tuple[int, ...]]) -> list[ProbeAnswer]:
        """Return the engine's greedy answers, which no token ends."""
        assert self._engine is not None
        requests = [EngineRequest(prompt, PROBE_TOKENS) for prompt in prompts]
        finished = dict(
            self._engine.run(requests, Purpose(self._sampling(greedy=True), [], logps=True), seed=0)
        )
        return [
            ProbeAnswer(finished[row].generated_tokens, finished[row].logprobs) for row in range(len(prompts))
        ]


class EngineError(RuntimeError):
    """The engine gave up a request."""


class EngineRequest(NamedTuple):
    """One response to sample."""

    prompt: tuple[int, ...]
    longest: int  # tokens


class Purpose(NamedTuple):
    """What a manager of the engine is made for."""

    sampling: dict[str, Any]  # as in transformers' GenerationConfig
    ends: list[int]  # ids that end a response
    logps: bool = False  # whether each token's log-prob comes along


class _Engine:
    """The engine on one model, whose weights must not change while it lives: its cache holds what they made."""

    def __init__(self, model: nn.Module, rows: int | None) -> None:
        unwrapped: Any = getattr(
            model, "get_base_model", None
        )  # of PEFT's wrapper: its layers hold the adapter
        self.model: Any = unwrapped() if unwrapped else model
        self.rows = rows
        # what the manager that waits on the model was made for, and the longest prompt and response together
        self._held: Purpose | None = None
        self._capacity = 0

    def run(
        self, requests: Sequence[EngineRequest], purpose: Purpose, *, seed: int
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """Yield (position, response) as each is complete; the model and torch's random state are left as found.

        Args:
            requests: the responses.
            purpose: how to sample them.
            seed: of the stream that all of them draw from.

        Raises:
            EngineError: if a response cannot be made.
        """
        device: torch.device = self.model.device
        with (
            configs_kept(self.model),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            with torch.inference_mode(False):  # what is made here is written to by another thread
                manager = self._manager(requests, purpose)
            manager.background_thread_status.clear()  # once stopped, it would take no request before its start
            for row, (prompt, longest) in enumerate(requests):
                manager.add_request(list(prompt), request_id=str(row), max_new_tokens=longest)
            torch.manual_seed(seed)
            manager.start()  # not before it has all requests, or what shares a forward pass would depend on timing
            complete = False
            try:
                for _ in requests:
                    yield _next_result(manager)
                complete = True
            finally:
                manager.stop(block=True, keep_for_next_session=complete, hard_stop=not complete)
                if not complete:
                    self.close()

    def close(self) -> None:
        """Free the cache."""
        self.model.destroy_cached_continuous_batching_manager()
        self._held = None

    def _manager(self, requests: Sequence[EngineRequest], purpose: Purpose) -> Any:
        """Return the manager of the last run if it serves, else a new one."""
        from transformers import GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        prompt = max(len(one.prompt) for one in requests)
        response = max(one.longest for one in requests)
        if self._held == purpose and prompt + response <= self._capacity:
            return self.model.init_continuous_batching()
        self.close()
        capacity = PAGE * math.ceil((prompt + response) / PAGE)
        manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(eos_token_id=purpose.ends or -1, **purpose.sampling),
            continuous_batching_config=self._config(capacity, purpose.logps),
            workload_hints=WorkloadHints(capacity - response, response, len(requests)),
        )
        manager.warmup()
        self._held, self._capacity = purpose, capacity
        return manager

    def _config(self, capacity: int, logps: bool) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings: dict[str, Any] = {
            "max_requests_per_batch": self.rows,
            "max_memory_percent": MEMORY_SHARE,
            "return_logprobs": logps,
            "disable_nccl_graph_mixing": False,  # a process-wide switch that training's own NCCL would inherit
        }
        if self.model.device.type == "cpu":
            # unasked, the engine takes most of the machine's memory and writes to all of it
            rows = self.rows or CPU_ROWS
            settings |= {
                "max_requests_per_batch": rows,
                "num_blocks": 2 * rows * capacity // PAGE,
                "max_batch_tokens": max(rows, CPU_BATCH_TOKENS),
            }
        return ContinuousBatchingConfig(**settings)


def _next_result(manager: Any) -> tuple[int, GenerationOutput]:
    while True:
        output = manager.get_result(timeout=POLL_SECONDS)
        if output is not None and output.error is not None:
            raise EngineError(output.error)
        if output is not None and output.is_finished():
            return int(output.request_id), output
        if output is None and not manager.is_running():
            raise EngineError("its thread ended")


@contextmanager
def configs_kept(model: nn.Module) -> Iterator[None]:
    """Give every config of a model its settings back when the context ends."""
    configs = {
        id(config): config
        for module in model.modules()
        for name in ("config", "generation_config")
        if (config := getattr(module, name, None)) is not None
    }
    before = [(config, dict(vars(config))) for config in configs.values()]
    try:
        yield
    finally:
        for config, settings in before:
            vars(config).clear()
            vars(config).update(settings)
