"""What manifests held before they had a format number (commit a42d472), so that those run folders are accepted."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping
from typing import Any

import torch

_LEFT_OUT = {
    *("batch_size", "batch_tokens", "between_phases", "gpu_memory_utilization"),
    *("base_url", "api_key_env", "max_concurrency", "timeout", "max_retries"),
}
_NEWER = {
    "label": None,
    "base": None,
    "conversational": False,
}  # arguments that came later, and their defaults


def legacy_description(component: object) -> dict[str, Any]:
    """Return a component as manifests without a format number describe it: its defining module and public attributes.

    Digests were taken of the JSON, so that the order counts. A class that moves within this package needs its old
    module here.
    """
    public = {name: value for name, value in vars(component).items() if not name.startswith("_")}
    old = {name: value for name, value in public.items() if name not in _NEWER or value != _NEWER[name]}
    settings = {name: _plain(value) for name, value in old.items() if name not in _LEFT_OUT}
    return {"class_path": _path(component), "init_args": settings}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(type(value), ABCMeta) and not isinstance(value, torch.nn.Module):
        return legacy_description(value)
    return _path(value)


def _path(value: object) -> str:
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
