"""A server on loopback that samples as vLLM does, with tiny models of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.servers import Answer, Request
from transformers import PreTrainedModel

from sppo_lightning.generation.parity import answer_logits, token_logps


@dataclass
class ModelServer:
    """Answers for vLLM's ``/v1/models``, ``/v1/completions`` and its two addresses for adapters.

    Args:
        base: the model that is served as ``base``.
        load: makes a model of the folder that an adapter is loaded from.
        limit: tokens of prompt and response together; more are cut, as vLLM does.
        end: the token that ends a response.
    """

    base: PreTrainedModel
    load: Callable[[Path], PreTrainedModel]
    limit: int = 512
    end: int = 1
    adapters: dict[str, PreTrainedModel] = field(default_factory=dict)
    sampled: list[Any] = field(default_factory=list)  # bodies of the requests with a seed
    _lock: Any = field(default_factory=threading.Lock)

    def __call__(self, request: Request) -> Answer:
        with self._lock:
            return getattr(self, request.path.rpartition("/")[2])(request.body)

    def models(self, body: None) -> Answer:
        base = {"id": "base", "parent": None, "max_model_len": self.limit}
        adapters = [{"id": name, "parent": "base", "max_model_len": None} for name in self.adapters]
        return Answer(200, {"object": "list", "data": [base, *adapters]})

    def load_lora_adapter(self, body: dict[str, str]) -> Answer:
        self.adapters[body["lora_name"]] = self.load(Path(body["lora_path"]))
        return Answer(200, "Success")

    def unload_lora_adapter(self, body: dict[str, str]) -> Answer:
        del self.adapters[body["lora_name"]]
        return Answer(200, "Success")

    def completions(self, body: dict[str, Any]) -> Answer:
        model = {"base": self.base, **self.adapters}.get(body["model"])
        if model is None:
            return Answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        prompt = body["prompt"]
        if len(prompt) >= self.limit:
            return Answer(400, {"error": {"message": "the prompt exceeds the maximum context length"}})
        if "seed" in body:
            self.sampled.append(body)
        tokens, finish = self._sample(model, prompt, body)
        logps = token_logps(answer_logits(model, prompt, tokens), torch.tensor(tokens)).tolist()
        said = {"token_logprobs": logps} if "logprobs" in body else None
        choice = {"index": 0, "text": "", "finish_reason": finish, "token_ids": tokens, "logprobs": said}
        return Answer(200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    def _sample(
        self, model: PreTrainedModel, prompt: list[int], body: dict[str, Any]
    ) -> tuple[list[int], str]:
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        tokens: list[int] = []
        while len(tokens) < body["max_tokens"] and len(prompt) + len(tokens) < self.limit:
            logits = answer_logits(model, prompt, [*tokens, 0])[-1]
            if body["temperature"] == 0:
                tokens.append(int(logits.argmax()))
            else:
                probs = (logits / body["temperature"]).softmax(-1)
                tokens.append(int(torch.multinomial(probs, 1, generator=generator)))
            if tokens[-1] == self.end and not body.get("ignore_eos"):
                return tokens, "stop"
        return tokens, "length"
