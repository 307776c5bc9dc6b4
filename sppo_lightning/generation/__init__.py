"""Generation engines."""

from sppo_lightning.generation.auto import AutoGenerator
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
