"""Keeps secrets out of what a run writes: configs, manifests and model cards outlive a run, and are handed on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "(secret, not stored)"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# words that make a name a secret's, wherever they stand in it
_ALWAYS = _words(
    "apikey auth authorization bearer credential credentials passphrase passwd password pwd secret secrets"
)
# what stands before ``key`` where it names a place in a mapping
_OF_A_PLACE = _words(
    "answer by cache column data dict each field foreign group index join json message metadata metric monitor order "
    "per primary prompt public response reward row score sort"
)
# what stands before ``token`` where it is a piece of text
_OF_A_TEXT = _words(
    "audio begin bos by cls each end eos first image last mask new next pad per prompt response sep special start stop "
    "think unk video"
)
# what stands before ``keys`` and ``tokens`` where they are secrets
_SEVERAL = _words("access admin api private ssh")
_USER = re.compile(r"(://[^/@\s:]*:)[^/@\s]+(?=@)")
_QUERY = re.compile(r"([?&]([\w.-]+)=)[^&#\s'\"]+")
_BEARER = re.compile(r"\b(bearer)\s+[^\s'\",;)}\]]+", re.IGNORECASE)


def names_secret(name: str) -> bool:
    """Return whether a setting's name says that its value is a secret.

    ``api_key``, ``hf_token`` and ``password`` do; ``api_key_env``, ``eos_token``, ``max_tokens`` and ``answer_key``
    do not.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in ("env", "file", "path", "name"):  # where a secret is, not what it is
        return False
    if _ALWAYS & set(words):
        return True
    before, last = words[:-1], words[-1]
    if last == "key":
        return not _OF_A_PLACE & set(before)
    if last == "token":
        return not _OF_A_TEXT & set(before)
    return last in ("keys", "tokens") and bool(_SEVERAL & set(before))


def masked(value: Any, name: str = "") -> Any:
    """Return a setting with :data:`MASK` for what is secret in it: by its name, or a password or token by its form.

    Args:
        value: a setting as YAML and JSON have them; mappings hold settings by name.
        name: of the setting.
    """
    return _masked(value, secret=names_secret(name))


def _masked(value: Any, *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        inside = secret and "class_path" not in value
        return {key: _masked(item, secret=inside or names_secret(str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, secret=secret) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if secret:
        return MASK
    return without_passwords(value, MASK) if isinstance(value, str) else value


def without_passwords(text: str, instead: str = "…") -> str:
    """Return a text without passwords and keys in addresses, and without bearer tokens."""
    text = _USER.sub(lambda found: found[1] + instead, text)
    text = _QUERY.sub(lambda found: found[1] + instead if names_secret(found[2]) else found[0], text)
    return _BEARER.sub(lambda found: f"{found[1]} {instead}", text)


def masked_keys(value: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of settings that hold :data:`MASK`: their values are not known any more."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from masked_keys(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from masked_keys(item, f"{key}[{number}]")
    elif isinstance(value, str) and MASK in value:
        yield key
