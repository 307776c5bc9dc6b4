"""Engines that sample responses: token ids in, sampled token ids out; chosen by ``data.generator``.

- One uniform per token from the response's own random generator, turned into a token by inverse CDF over the warped
  distribution: batch size, order and number of processes change no response in float32; in bfloat16 a near-tie may
  fall the other way. An engine that cannot do this says ``reproducible = False``.
- Batched decoding is checked once in a run, on its first policy, against the model's plain forward: prompts padded on
  the left and read once, copied to their responses, compacted, extended. What a sequence then takes in the cache is
  measured.
- On a CPU a decoding step is the model's own forward with a cache that is written in place; on a GPU the same through
  buffers of fixed places, so that a CUDA graph replays it; the two are compared before the first sample. Graphs live
  as long as a batch, since an adapter may be switched off or moved before the next one.
"""

from sppo_lightning.generation.auto import AutoGenerator
from sppo_lightning.generation.cached import CachedGenerator
from sppo_lightning.generation.continuous import ContinuousBatchingGenerator
from sppo_lightning.generation.hf import HFGenerator
from sppo_lightning.generation.protocol import Generator, PolicySource, PromptResponses, SampleRequest
from sppo_lightning.generation.server import OpenAIServerGenerator
from sppo_lightning.generation.vllm import VLLMGenerator
from sppo_lightning.generation.weight_sync import (
    ModelFolder,
    OffPolicy,
    SGLangWeights,
    VLLMAdapter,
    WeightSync,
)

__all__ = [
    "AutoGenerator",
    "CachedGenerator",
    "ContinuousBatchingGenerator",
    "Generator",
    "HFGenerator",
    "ModelFolder",
    "OffPolicy",
    "OpenAIServerGenerator",
    "PolicySource",
    "PromptResponses",
    "SGLangWeights",
    "SampleRequest",
    "VLLMAdapter",
    "VLLMGenerator",
    "WeightSync",
]
