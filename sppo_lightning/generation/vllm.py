"""Generation through vLLM in the training process: asleep while the policy trains, then handed its weights."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sppo_lightning.generation.parity import PROBE_TOKENS, ProbeAnswer, check_parity
from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.policy.anatomy import embedding_rows, unwrapped
from sppo_lightning.policy.merging import merged_weights
from sppo_lightning.types import UserError

DISCARD = 2  # the level of vLLM's sleep that gives up weights and cache, since new weights come anyway


class VLLMGenerator(Generator):
    """Samples with vLLM on the trainer's GPU; pip install 'sppo-lightning[vllm]'.

    Not run on a GPU yet: written against the documented API of vLLM 0.27 to 0.32. On a CPU vLLM has no sleep mode, and
    the engine is refused. Every :meth:`load` hands over the
    policy's weights in memory, an adapter merged on the way, then checks vLLM against the policy's plain forward.

    Not reproducible: each response has a seed of its own, but vLLM promises the same tokens for it only where the
    whole batch is the same.

    Args:
        gpu_memory_utilization: share of the GPU's memory that vLLM takes while it is awake, weights included.
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`;
            ``max_total_tokens`` is also vLLM's context length, else the policy's own.
    """

    def __init__(self, gpu_memory_utilization: float = 0.4, **sampling: Any) -> None:
        super().__init__(**sampling)
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"VLLMGenerator.gpu_memory_utilization={gpu_memory_utilization} must lie in (0, 1]"
            )
        self.gpu_memory_utilization = gpu_memory_utilization
        self._policy: PolicySource | None = None
        self._llm: Any = None
        self._folder: TemporaryDirectory[str] | None = None  # of the config that vLLM reads

    @property
    def reproducible(self) -> bool:
        """Never, by vLLM's own word."""
        return False

    def check(self) -> None:
        """Require vLLM, on a platform where it can sleep."""
        if find_spec("vllm") is None:
            raise UserError("data.generator VLLMGenerator needs vLLM: pip install 'sppo-lightning[vllm]'")
        from vllm.platforms import current_platform

        if not current_platform.is_sleep_mode_available():
            raise UserError(
                "data.generator VLLMGenerator puts vLLM to sleep while the policy trains, which vLLM cannot do on this "
                f"platform ({current_platform.device_type}): start a vLLM server and use OpenAIServerGenerator, or use "
                "sppo_lightning.generation.HFGenerator"
            )

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Count the share of the GPU that is vLLM's own; the policy is there too, to hand its weights over."""
        return EngineMemory(copies=True, rows=0, reserved=int(self.gpu_memory_utilization * total))

    def load(self, policy: PolicySource) -> None:
        """Wake vLLM, or start it the first time, and hand it the policy's weights.

        Raises:
            ParityError: if vLLM then does not reproduce the policy.
            UserError: if the policy's weights are quantised, or several processes share the run.
        """
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes > 1:
            raise UserError(
                f"VLLMGenerator serves a single process, but this run has {processes}: set trainer.devices: 1, or use "
                "sppo_lightning.generation.HFGenerator"
            )
        self._policy = policy
        model: Any = policy.sampling_model()
        if getattr(model.config, "quantization_config", None) is not None:
            raise UserError(
                "VLLMGenerator takes 16-bit weights, but the policy's are quantised, and an adapter is never merged "
                "into those: set model.policy.quantization: none, or use sppo_lightning.generation.HFGenerator"
            )
        if self._llm is None:
            self._llm = self._start(model)
            self._llm.sleep(level=DISCARD)
        self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()  # its keys and values are of older weights
        vocabulary = min(len(policy.tokenizer), embedding_rows(model))
        try:
            check_parity(
                model,
                self._probe,
                engine="VLLMGenerator",
                vocabulary=vocabulary,
                longest=self.max_total_tokens,
            )
        except UserError:
            self.unload()
            raise

    def unload(self) -> None:
        """Put vLLM to sleep: it keeps neither weights nor cache."""
        if self._llm is not None:
            self._llm.sleep(level=DISCARD)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield the responses once all are complete."""
        assert self._policy is not None
        prompts, settings = [], []
        for request in requests:
            prompts += [request.token_ids] * max(1, len(request.seeds))
            settings += [self._sampling(request, seed) for seed in request.seeds or (None,)]
        rows = iter(self._outputs(prompts, settings) if prompts else [])
        for index, request in enumerate(requests):
            outputs = [next(rows) for _ in range(max(1, len(request.seeds)))]
            yield PromptResponses(
                index, [self.as_response(output.token_ids, self._policy) for output in outputs]
            )

    def _sampling(self, request: SampleRequest, seed: int | None) -> dict[str, Any]:
        """Return what vLLM's ``SamplingParams`` take for one response; no seed asks for the greedy one."""
        assert self._policy is not None
        warp: dict[str, Any] = {"temperature": 0.0}
        if seed is not None:
            warp = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": seed}
        return {
            **warp,
            "max_tokens": self.longest_response(len(request.token_ids)),
            "stop": self.stop,
            "stop_token_ids": sorted(self._policy.end_token_ids),
            "ignore_eos": True,  # the model config's: the policy's own end tokens are all there are
            "detokenize": self.stop is not None,
        }

    def _probe(self, prompts: Sequence[tuple[int, ...]]) -> list[ProbeAnswer]:
        """Return vLLM's greedy answers, which no token ends."""
        settings = {
            "temperature": 0.0,
            "max_tokens": PROBE_TOKENS,
            "ignore_eos": True,
            "logprobs": 0,  # those of the sampled tokens alone
            "detokenize": False,
        }
        return [
            ProbeAnswer(
                list(output.token_ids),
                [
                    logps[token].logprob
                    for token, logps in zip(output.token_ids, output.logprobs, strict=True)
                ],
            )
            for output in self._outputs(prompts, [settings] * len(prompts))
        ]

    def _outputs(self, prompts: Sequence[tuple[int, ...]], settings: Sequence[dict[str, Any]]) -> list[Any]:
        """Return one vLLM ``CompletionOutput`` a prompt."""
        from vllm import SamplingParams

        results = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [SamplingParams(**one) for one in settings],
            use_tqdm=False,
        )
        outputs = [result.outputs[0] for result in results]
        for output in outputs:
            if output.finish_reason not in ("stop", "length"):
                raise UserError(
                    f"vLLM gave up a response (finish_reason={output.finish_reason!r}): see its log above"
                )
        return outputs

    def _start(self, model: Any) -> Any:
        """Return a vLLM engine of the model's architecture, its weights still to come."""
        assert self._policy is not None
        # with the engine in a process of its own, weights could not be handed over in memory
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._folder = TemporaryDirectory(prefix="vllm-")
        config = copy.deepcopy(model.config)
        config.architectures = [type(unwrapped(model)).__name__]
        config.save_pretrained(self._folder.name)
        if self.stop is not None:
            self._policy.tokenizer.save_pretrained(self._folder.name)
        with random_state_kept():
            return LLM(
                model=self._folder.name,
                skip_tokenizer_init=self.stop is None,
                load_format="dummy",
                dtype=str(unwrapped(model).dtype).removeprefix("torch."),
                generation_config="vllm",  # no sampling defaults of the model's
                max_model_len=self.max_total_tokens,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enable_sleep_mode=True,
            )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Undo what seeding in the context does to Python, numpy and torch: an engine seeds them all when it starts."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
