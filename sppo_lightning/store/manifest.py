"""What made an iteration, as a manifest says it: a component's class and settings."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping
from typing import Any

import torch

FREE_SETTINGS = {
    *("batch_size", "batch_tokens", "between_phases", "gpu_memory_utilization"),
    *("base_url", "api_key_env", "max_concurrency", "timeout", "max_retries"),
}
"""Settings of generators and rewards that decide speed or place, not results."""


def describe(component: object) -> dict[str, Any]:
    """Return a component's class and public settings as JSON types, for a manifest.

    :data:`FREE_SETTINGS` are left out; components inside are described too.
    """
    public = {name: value for name, value in vars(component).items() if not name.startswith("_")}
    settings = {name: _plain(value) for name, value in public.items() if name not in FREE_SETTINGS}
    return {"class_path": _plain_name(component), "init_args": settings}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(type(value), ABCMeta) and not isinstance(value, torch.nn.Module):
        return describe(value)
    return _plain_name(value)


def _plain_name(value: object) -> str:
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
