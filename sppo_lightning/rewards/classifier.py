"""A reward model: any sequence-classification model, or an adapter that makes one of a language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from sppo_lightning.paths import expand_path
from sppo_lightning.policy.footprint import loaded_footprint
from sppo_lightning.policy.pretrained import (
    DTYPES,
    check_quantization,
    load_model_config,
    load_tokenizer,
    quantization_options,
)
from sppo_lightning.policy.weights import read_model
from sppo_lightning.prompts.chat_template import template_owner, template_token_ids
from sppo_lightning.rewards.adapter import RewardAdapter, reward_adapter
from sppo_lightning.rewards.classifier_forward import ACTIVATIONS, ClassifierForward
from sppo_lightning.rewards.protocol import Reward, RewardMemory, Scores
from sppo_lightning.system.device_memory import release
from sppo_lightning.types import Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "data.reward.init_args.pretrained"
BASE_KEY = "data.reward.init_args.base"
LABEL_KEY = "data.reward.init_args.label"
QUANTIZATION_KEY = "data.reward.init_args.quantization"


class SequenceClassificationReward(Reward):
    """Scores with the logit of a ``…ForSequenceClassification`` model, or of a LoRA adapter that was trained as one.

    The conversation goes through the model's own chat template; a model without one gets the text pair
    (prompt, response). A response whose conversation exceeds ``max_tokens`` is dropped as ``too_long_to_score``: a
    truncated answer has no honest score. A causal model reads a prompt once for all its responses.

    Args:
        pretrained: a HF folder or hub id; or a folder with a LoRA adapter for sequence classification (PEFT,
            ``SEQ_CLS``), which is merged into its base.
        batch_tokens: most tokens of a batch, padding included; ``None``: what the memory holds.
        max_tokens: longest conversation, in the reward model's tokens; ``None``: what the model and its
            tokenizer allow.
        dtype: dtype of the weights; ``auto``: bfloat16 on CUDA, float32 on CPU.
        quantization: 4-bit NF4 or 8-bit weights through bitsandbytes. 8-bit scores depend a little on what shares
            their batch: set ``batch_tokens`` then, so that batches do not follow the free memory.
        between_phases: where the model waits while it is not needed: in ``host`` memory, or nowhere (``free``: it is
            read again each time).
        trust_remote_code: run code that comes with the model.
        label: which logit is the reward, from 0; needed where the model has several.
        base: of an adapter, instead of the one that it names.
    """

    def __init__(
        self,
        pretrained: str,
        batch_tokens: int | None = None,
        max_tokens: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantization: Literal["none", "nf4", "int8"] = "none",
        between_phases: Literal["host", "free"] = "host",
        trust_remote_code: bool = False,
        label: int | None = None,
        base: str | None = None,
    ) -> None:
        for name, value in {"batch_tokens": batch_tokens, "max_tokens": max_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"SequenceClassificationReward.{name}={value} must be at least 1")
        self.pretrained = expand_path(pretrained, key=KEY)
        self.batch_tokens = batch_tokens
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.quantization = quantization
        self.between_phases = between_phases
        self.trust_remote_code = trust_remote_code
        self.label = label
        self.base = None if base is None else expand_path(base, key=BASE_KEY)
        self._adapter: RewardAdapter | None = None
        self._model: PreTrainedModel | None = None
        self._forward: ClassifierForward | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def check(self) -> None:
        """Read the model's configuration and require a single logit, and what its quantisation needs."""
        config = self._config()
        check_quantization(self.quantization, None, key=QUANTIZATION_KEY)
        labels = int(config.num_labels)
        if self.label is None and labels != 1:
            raise UserError(
                f"{KEY}={self.pretrained!r} has {labels} logits, and a reward is one: say which with {LABEL_KEY}, "
                f"from 0 to {labels - 1}"
            )
        if self.label is not None and not 0 <= self.label < labels:
            raise UserError(f"{LABEL_KEY}={self.label}: the model has the logits 0 to {labels - 1}")
        if self._adapter is not None and self.quantization != "none":
            raise UserError(
                f"{KEY}={self.pretrained!r} is an adapter, which is not merged into quantised weights: leave out "
                f"{QUANTIZATION_KEY}, or give a whole reward model"
            )
        self._tokenizer = self._load_tokenizer()

    def _config(self) -> Any:
        self._adapter = reward_adapter(self.pretrained, self.base, key=KEY)
        location, key = (self.pretrained, KEY) if self._adapter is None else (self._adapter.base, BASE_KEY)
        expect: Literal["reward", "any"] = "reward" if self._adapter is None else "any"
        config = load_model_config(location, key=key, trust_remote_code=self.trust_remote_code, expect=expect)
        if self._adapter is not None:
            self._adapter.configure(config)
        return config

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the model's folder; an adapter without one takes its base's."""
        own = Path(self.pretrained, "tokenizer_config.json").exists() or self._adapter is None
        location = self.pretrained if own or self._adapter is None else self._adapter.base
        return load_tokenizer(location, key=KEY, trust_remote_code=self.trust_remote_code)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require conversations that the reward model can read; each sequence of roles and fields is tried once."""
        assert self._tokenizer is not None
        tried: set[tuple[tuple[str, ...], ...]] = set()
        for prompt in prompts:
            turns = tuple((turn["role"], *sorted(turn)) for turn in prompt.messages)
            if turns in tried:
                continue
            tried.add(turns)
            if self._tokenizer.chat_template is None and len(turns) > 1:
                raise UserError(
                    f"prompt {prompt.id!r} has several messages, but the reward model {self.pretrained!r} has no chat "
                    "template and reads one text: use single prompts, or another data.reward"
                )
            self._encode(prompt, "a")

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Count the model's weights without reading them; activations are the rule of thumb that sizes its batches.

        Raises:
            CannotEstimateError: if the weights are stored quantised, but not by bitsandbytes.
        """
        from transformers import AutoModelForSequenceClassification

        check_quantization(self.quantization, device, key=QUANTIZATION_KEY)
        config = self._config()
        dtype = self._dtype(device)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, trust_remote_code=self.trust_remote_code
            )
        found = loaded_footprint(model, config, self.quantization)
        width = ACTIVATIONS * config.get_text_config().hidden_size * dtype.itemsize
        waits_there = device.type == "cpu" and self.between_phases == "host"
        return RewardMemory(
            weights=found.weights,
            conversation=found.widest + width * min(tokens, self.max_tokens or tokens),
            waiting=found.weights if waits_there else 0,
        )

    def smaller(self) -> Mapping[str, Reward]:
        """Let the model wait nowhere; quantise it, if that can be done here."""
        ways = [("between_phases", "host", "free")]
        if find_spec("bitsandbytes") is not None:
            ways.append(("quantization", "none", "nf4"))
        found: dict[str, Reward] = {}
        for name, usual, other in ways:
            if getattr(self, name) == usual:
                smaller = copy.copy(self)
                setattr(smaller, name, other)
                found[f"init_args.{name}={other}"] = smaller
        return found

    def load(self, device: torch.device) -> None:
        """Bring the model onto ``device``; read it first, if it does not wait in host memory."""
        self._config()
        self._tokenizer = self._load_tokenizer()
        if self._model is None:
            self._model = self._read(device)
        _move(self._model, device)
        if self._forward is None:
            self._forward = ClassifierForward(self._model, self.batch_tokens, self.label or 0)

    def _dtype(self, device: torch.device) -> torch.dtype:
        return DTYPES.get(self.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def _read(self, device: torch.device) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        dtype = self._dtype(device)
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        if self.quantization != "none":
            options["quantization_config"] = quantization_options(self.quantization, dtype)
            options["device_map"] = {"": str(device)}
        given = f"{KEY}={self.pretrained!r}"
        if self._adapter is not None:
            model = self._adapter.read(given=given, **options)
        else:
            model = read_model(AutoModelForSequenceClassification, self.pretrained, given=given, **options)
        model.eval()
        return model

    def unload(self) -> None:
        """Leave the device: to host memory, or altogether."""
        if self._model is None:
            return
        device = self._model.device
        if self.between_phases == "host":
            _move(self._model, torch.device("cpu"))
        else:
            self._model = self._forward = None
        release(device)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the model's logit for each conversation."""
        assert self._forward is not None
        encoded = [
            self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        ]
        rewards = [float("nan")] * len(encoded)
        limit, _ = self._limit()
        fitting = [row for row, tokens in enumerate(encoded) if len(tokens["input_ids"]) <= limit]
        if fitting:
            found = self._forward.scores(
                [encoded[row] for row in fitting], [prompts[row].id for row in fitting]
            )
            for row, score in zip(fitting, found, strict=True):
                rewards[row] = score
        dropped = [row for row in range(len(encoded)) if len(encoded[row]["input_ids"]) > limit]
        return Scores(
            rewards, dict.fromkeys(dropped, "too_long_to_score"), error=self._said(encoded, dropped)
        )

    def _said(self, encoded: Sequence[Mapping[str, list[int]]], dropped: Sequence[int]) -> str | None:
        """Return what to tell a user about conversations that are too long."""
        if not dropped:
            return None
        limit, whose = self._limit()
        longest = max(len(encoded[row]["input_ids"]) for row in dropped)
        return (
            f"a conversation has {longest} tokens, and {self.pretrained!r} reads {limit} ({whose}): set the reward's "
            "max_tokens, if it reads more"
        )

    def _limit(self) -> tuple[int, str]:
        """Return how many tokens a conversation may have, and which setting says so."""
        assert self._model is not None
        assert self._tokenizer is not None
        if self.max_tokens is not None:
            return self.max_tokens, "max_tokens"
        positions = getattr(self._model.config, "max_position_embeddings", None) or 2**31
        own = self._tokenizer.model_max_length
        return min(
            (int(positions), "max_position_embeddings of its config"),
            (int(own), "its tokenizer's model_max_length"),
        )

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        assert self._tokenizer is not None
        if self._tokenizer.chat_template is None:
            pair = self._tokenizer(
                [prompt.text], [response]
            )  # not in lists, an empty response would be no pair
            return {name: values[0] for name, values in pair.items()}
        answer = Message(role="assistant", content=response)
        owner = template_owner(KEY, self.pretrained)
        ids = template_token_ids(
            self._tokenizer, (*prompt.messages, answer), add_generation_prompt=False, owner=owner
        )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _move(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model; bitsandbytes 0.50 holds 8-bit weights where ``to`` of the whole model does not reach them."""
    model.to(cast(Any, device))
    for layer in model.modules():
        state: Any = getattr(layer, "state", None)
        if getattr(state, "CB", None) is not None:
            state.CB, state.SCB = state.CB.to(device), state.SCB.to(device)
            cast(Any, layer).weight.data = state.CB
