"""Whether prompts leave room for a response: in the policy's context, and in what an engine takes."""

from __future__ import annotations

import sys
from typing import Any

from sppo_lightning.generation.protocol import Generator
from sppo_lightning.types import UserError


def check_context(longest: int, generator: Generator, model_config: Any, *, key: str) -> None:
    """Refuse prompts that leave no room for a response in the policy's context.

    Args:
        longest: tokens of the longest of them.
        generator: answers them.
        model_config: the policy's own settings.
        key: where the config names them.

    Raises:
        UserError: with the lengths, in tokens.
    """
    new = generator.longest_response(longest)
    if new < 1:
        raise UserError(
            f"data.{key}: the longest prompt has {longest} tokens, which leaves no room for a response under the "
            f"generator's max_total_tokens={generator.max_total_tokens}: lower data.max_prompt_tokens or raise it"
        )
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and longest + new > context:
        raise UserError(
            f"data.{key}: the longest prompt has {longest} tokens, with {new} new ones more than the policy's "
            f"context of {context}: lower data.max_prompt_tokens or the generator's max_new_tokens"
        )
    switch = rope_switch(model_config)
    if switch is not None and longest + new > switch:
        raise UserError(
            f"data.{key}: the longest prompt has {longest} tokens, with {new} new ones more than the {switch} at which "
            "the policy's LongRoPE changes its factors, for all that share a batch with such a sequence: their samples "
            "and log-probs would depend on it; lower data.max_prompt_tokens or the generator's max_new_tokens"
        )


def check_engine_limit(longest: int, generator: Generator) -> None:
    """Refuse an engine that would cut responses short which the config gives more tokens.

    Args:
        longest: tokens of the longest prompt.
        generator: answers it.

    Raises:
        UserError: with the lengths, in tokens.
    """
    limit, new = generator.total_limit(), generator.longest_response(longest)
    if limit is not None and longest + new > limit:
        raise UserError(
            f"data.generator {type(generator).__name__} takes {limit} tokens of prompt and response together, but the "
            f"longest prompt has {longest}, with {new} new ones {longest + new}: let it take more (a vLLM server: "
            f"--max-model-len {longest + new}), or set max_total_tokens: {limit}, which shortens responses to long "
            "prompts"
        )


def longest_prompt(generator: Generator, model_config: Any) -> int:
    """Return the most tokens of a prompt that leave the policy room for a response.

    Args:
        generator: answers.
        model_config: the policy's own settings.
    """
    most = generator.max_total_tokens
    bounds = [
        getattr(model_config, "max_position_embeddings", None),
        rope_switch(model_config),
        generator.total_limit(),
    ]
    limits = [
        bound - generator.max_new_tokens
        for bound in bounds
        if bound is not None and (most is None or most > bound)
    ]
    return min([*limits, *([] if most is None else [most - 1])], default=sys.maxsize)


def rope_switch(model_config: Any) -> int | None:
    """Return the positions past which LongRoPE (arXiv 2402.13753) takes other factors; ``None``: it never does.

    Phi-3-128k, Phi-3.5 and Phi-4-mini have it. transformers takes one set of factors for a whole batch, by the longest
    sequence in it.

    Args:
        model_config: a model's own settings.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    given = getattr(text, "rope_parameters", None) or {}
    for rope in (given, *given.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            switch = rope.get("original_max_position_embeddings")
            return switch or getattr(text, "original_max_position_embeddings", None)
    return None
