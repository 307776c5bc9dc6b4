"""Generation engines."""

from sppo_lightning.generation.hf import HFGenerator
from sppo_lightning.generation.protocol import Generator, PolicySource, PromptResponses, SampleRequest

__all__ = ["Generator", "HFGenerator", "PolicySource", "PromptResponses", "SampleRequest"]
