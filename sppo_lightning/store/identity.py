"""What a component is: the class that a config names, and what the class was given."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Set
from enum import Enum
from inspect import Parameter
from typing import Any

from sppo_lightning.redaction import masked

NOTHING_FREE: frozenset[str] = frozenset()
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def identity(component: object) -> dict[str, Any]:
    """Return what a config would have to say to get this component, as JSON types: ``class_path`` and ``init_args``.

    Arguments that have their defaults are left out, so that a class may get new ones; so are those in the class's
    ``free_settings``. Components inside are treated alike.

    Secrets are masked: an identity is written into manifests.

    As in scikit-learn, an argument is read from the attribute of its name, which may have an underscore in front. What
    else the object holds (counters, caches, models) is no part of its identity; nor is an argument that it keeps
    nowhere.
    """
    return _identity(component, NOTHING_FREE)


def parameters(owner: Callable[..., Any]) -> dict[str, Parameter]:
    """Return what a class takes by name, the arguments included that ``**kwargs`` hand on to its base class."""
    if not isinstance(owner, type):
        return _named(owner)
    found: dict[str, Parameter] = {}
    for base in owner.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        found = {**_named(init), **found}
        if not any(taken.kind is Parameter.VAR_KEYWORD for taken in _signature(init)):
            break
    found.pop("self", None)
    return found


def free_settings(owner: object, outer: frozenset[str]) -> frozenset[str]:
    """Return which arguments of a class decide speed or place only.

    Args:
        owner: the class.
        outer: those of the component that it is an argument of, for a class that does not say.
    """
    own: frozenset[str] = getattr(owner, "free_settings", outer)
    return own


def _identity(component: object, outer: frozenset[str]) -> dict[str, Any]:
    kind = type(component)
    free = free_settings(kind, outer)
    settings = {}
    for name, parameter in parameters(kind).items():
        if name in free or not (hasattr(component, name) or hasattr(component, f"_{name}")):
            continue
        value = _plain(getattr(component, name if hasattr(component, name) else f"_{name}"), free)
        if parameter.default is Parameter.empty or value != _plain(parameter.default, free):
            settings[name] = masked(value, name)
    return {"class_path": _path(kind), "init_args": settings}


def _plain(value: object, free: frozenset[str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, free) for item in value]
    if isinstance(value, Set):
        return sorted((_plain(item, free) for item in value), key=str)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, free) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return _path(value)
    return _identity(value, free)


def _path(value: Any) -> str:
    """Return the shortest dotted path of a class or function: that of the package whose face shows it."""
    module, name = value.__module__, value.__qualname__
    parts = str(module).split(".")
    packages = (".".join(parts[:count]) for count in range(1, len(parts)))
    shown = (place for place in packages if getattr(sys.modules.get(place), name, None) is value)
    return f"{next(shown, module)}.{name}"


def _named(function: Callable[..., Any]) -> dict[str, Parameter]:
    return {taken.name: taken for taken in _signature(function) if taken.kind in _NAMED}


def _signature(function: Callable[..., Any]) -> list[Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a class that is not written in Python
        return []
