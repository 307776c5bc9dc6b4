"""Policies that are held in memory: those that differ by their adapter share a base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sppo_lightning.chat.choices import Choice
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.loading import disable_dropout, end_token_ids, load_base_model
from sppo_lightning.prompts.chat_template import template_token_ids
from sppo_lightning.prompts.encoding import asked
from sppo_lightning.types import Message, Prompt, UserError, first_line


class HeldModel:
    """A model in memory, with any number of adapters on it.

    Args:
        model: without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._names: dict[str, str] = {}  # PEFT's, by an adapter's folder

    def add(self, adapter: str) -> None:
        """Read an adapter, unless it is there.

        Raises:
            UserError: if it does not fit the model.
        """
        from peft import PeftModel

        if adapter in self._names:
            return
        name = f"adapter{len(self._names)}"
        try:
            if self._names:
                self.model.load_adapter(adapter, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, adapter, adapter_name=name).eval()
        except Exception as error:  # of any kind, by what stands in its files
            raise UserError(
                f"the adapter {adapter} cannot be read on its base ({first_line(error)})"
            ) from error
        self._names[adapter] = name
        self.model.eval()

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Any]:
        """Yield the model with one of its adapters, or with none."""
        if not self._names:
            yield self.model
        elif adapter is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self._names[adapter])
            yield self.model


class ChatPolicy:
    """A policy that can be asked.

    Args:
        choice: which.
        held: its model.
    """

    def __init__(self, choice: Choice, held: HeldModel) -> None:
        self.choice = choice
        self.held = held
        self.tokenizer = choice.load_tokenizer()

    @property
    def name(self) -> str:
        """For people."""
        return self.choice.name

    @property
    def conversational(self) -> bool:
        """Whether it has a chat template; else it goes on with a text, and knows of none before."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        model = unwrapped(self.held.model)
        return frozenset(end_token_ids(model.config, self.tokenizer, model.generation_config))

    @cached_property
    def window(self) -> int | None:
        """Tokens that the model has positions for; ``None`` if it does not say."""
        config = unwrapped(self.held.model).config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, unwrapped(self.held.model).get_input_embeddings().weight.device)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the model as this policy has it."""
        with self.held.active(self.choice.adapter) as model:
            yield model

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that the policy goes on with.

        Raises:
            UserError: if the chat template refuses it.
        """
        turns = tuple(messages if self.conversational else messages[-1:])
        prompt = Prompt("chat", turns[-1]["content"], turns)
        return template_token_ids(
            self.tokenizer,
            asked(prompt, self.choice.system_prompt if self.conversational else None),
            add_generation_prompt=True,
            arguments=self.choice.template_arguments,
        )

    def same_vocabulary(self, other: ChatPolicy) -> bool:
        """Whether a token id means the same to both."""
        return bool(self.tokenizer.get_vocab() == other.tokenizer.get_vocab())


class PolicyShelf:
    """The models in memory.

    Args:
        device: of all.
        dtype: of their weights; ``None``: of each, what its choice says.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self._held: dict[tuple[object, ...], HeldModel] = {}

    def load(self, choice: Choice) -> ChatPolicy:
        """Return a policy, on a model that is there if one fits.

        Raises:
            UserError: if it cannot be read.
        """
        config, dtype = choice.config, self.dtype or choice.dtype
        base = (
            str(Path(config.pretrained).resolve()) if Path(config.pretrained).exists() else config.pretrained
        )
        key = (base, dtype, config.quantization, config.double_quantization, config.trust_remote_code)
        if key not in self._held:
            name: Any = str(dtype).removeprefix("torch.")
            plain = replace(config, dtype=name, attn_implementation=None)
            model = load_base_model(plain, compute_dtype=dtype, device=self.device)
            disable_dropout(model)
            self._held[key] = HeldModel(model.eval())
        held = self._held[key]
        if choice.adapter is not None:
            held.add(choice.adapter)
        return ChatPolicy(choice, held)

    def keep(self, policies: Iterable[ChatPolicy]) -> None:
        """Free the models that none of these policies needs."""
        needed = [policy.held for policy in policies]
        self._held = {key: held for key, held in self._held.items() if any(held is one for one in needed)}
