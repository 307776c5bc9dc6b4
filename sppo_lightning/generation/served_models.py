"""What a server with OpenAI's API says that it serves."""

from __future__ import annotations

from typing import Any, NamedTuple

from sppo_lightning.system.servers import Failure, ServerClient


class ServedModel(NamedTuple):
    """One model of a server; ``None`` where it does not say."""

    name: str
    base: str | None  # name of the model that an adapter belongs to: vLLM's parent
    max_total_tokens: int | None  # of prompt and response together: vLLM's and SGLang's max_model_len


def served_models(client: ServerClient) -> list[ServedModel] | Failure:
    """Return what the server lists, or why that cannot be known."""
    return client.read(client.get("models"), lambda answer: [_read(card) for card in answer["data"]])


def token_limit(models: list[ServedModel], name: str | None) -> int | None:
    """Return the most tokens of prompt and response together that the server takes, or ``None`` if it does not say.

    Args:
        models: as the server lists them.
        name: which model is asked for; one that is not listed may be any of them.
    """
    bases = [one.base for one in models if one.name == name]
    own = [one for one in models if one.name in {name, *bases}]
    limits = [one.max_total_tokens for one in own or models if one.max_total_tokens is not None]
    return min(limits, default=None)


def _read(card: Any) -> ServedModel:
    limit = card.get("max_model_len")
    return ServedModel(
        str(card["id"]), card.get("parent"), limit if type(limit) is int and limit > 0 else None
    )
